"""Questions with answers: reference models, their training, and the benches of accuracy and speed."""
