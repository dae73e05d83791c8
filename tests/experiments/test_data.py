"""The corpus: split by file without leaks, and tokens that give the text back."""

import numpy as np
import pytest

from experiments import data
from experiments.data import encode, read_corpus, sample_windows, train_tokenizer


def source(rng, lines=12):
    """A file of lines that no other file has."""
    return "".join(f"value_{rng.integers(1 << 60)} = {rng.integers(1 << 60)}\n" for _ in range(lines))


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


@pytest.fixture
def library(rng, tmp_path):
    """Two hundred files in two versions of a library: enough for some to be held out."""
    files = {f"package/module_{i}.py": source(rng) for i in range(200)}
    write(tmp_path / "new", files)
    write(tmp_path / "old", files)
    return tmp_path, files


def test_a_file_is_on_one_side_only_and_in_no_other_version(library):
    root, files = library
    corpus = read_corpus([root / "new", root / "old"])
    assert set(corpus.train) | set(corpus.held_out) == set(files.values())
    assert not set(corpus.train) & set(corpus.held_out)
    assert len(corpus.train) + len(corpus.held_out) == len(files)
    assert 0 < len(corpus.held_out) < len(files) / 8  # 4 % of 200 expected


def test_the_split_is_by_path_whatever_the_text(rng, library):
    root, files = library
    other = {path: source(rng) for path in files}
    write(root / "third", other)
    before, after = (read_corpus([root / name]).held_out for name in ("new", "third"))
    assert [path for path in files if files[path] in before] == [path for path in files if other[path] in after]


def test_a_renamed_copy_of_a_held_out_file_is_dropped(rng, library):
    root, _ = library
    before = read_corpus([root / "new"])
    lines = before.held_out[0].splitlines(keepends=True)
    copied, own = "".join(lines[:6]) + source(rng, 6), source(rng, 11) + lines[0]  # a half, and a twelfth
    trained = (path for i in range(1000) if not data._is_held_out(path := f"renamed_{i}.py"))
    write(root / "new", {next(trained): copied, next(trained): own})
    assert set(read_corpus([root / "new"]).train) - set(before.train) == {own}


def test_what_is_no_source_is_passed_over(rng, library):
    root, _ = library
    before = read_corpus([root / "new"])
    write(root / "new", {"site-packages/a.py": source(rng), "b.so": source(rng), "empty.py": "\n"})
    (root / "new" / "latin.py").write_bytes("# é\n".encode("latin-1"))
    assert read_corpus([root / "new"]) == before


def test_bad_folders_are_named(tmp_path, rng):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"sources: .*empty holds no \.py"):
        read_corpus([tmp_path / "empty"])
    write(tmp_path / "one", {"a.py": source(rng)})
    with pytest.raises(ValueError, match="too few files to hold some out"):
        read_corpus([tmp_path / "one"])


def test_tokens_give_the_text_back(rng):
    texts = [source(rng), "ünïcödé — ✓\n", "x"]
    tokenizer = train_tokenizer(texts, 300)
    tokens = encode(tokenizer, texts)
    assert tokens.dtype == np.uint16
    starts = np.flatnonzero(tokens == tokenizer.token_to_id(data.END_OF_TEXT))
    assert starts[0] == 0
    assert [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])] == texts


def test_windows_are_distinct_runs_of_the_tokens(rng):
    tokens = np.arange(1000, dtype=np.uint16)
    windows = sample_windows(tokens, 7, 64, int(rng.integers(100)))
    assert windows.shape == (7, 64)
    assert (windows == windows[:, :1] + np.arange(64)).all()
    assert len(set(windows[:, 0])) == 7
    assert (windows[:, 0] % 64 == 0).all()
    with pytest.raises(ValueError, match="1000 hold 15 windows of 64, 16 asked for"):
        sample_windows(tokens, 16, 64, 0)
