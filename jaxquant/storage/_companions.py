"""The files of a Hugging Face folder that a model needs beside its weights: tokenizer, chat template, generation."""

import pathlib
import shutil

FOLDER = "huggingface"  # where a checkpoint of ours keeps them
PATTERNS = (
    *("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "spiece.model", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "generation_config.json", "preprocessor_config.json"),
)
SIZE_LIMIT = 1 << 28  # the largest tokenizers take a tenth of that


def copy_companions(source: pathlib.Path | None, target: pathlib.Path) -> None:
    """Copies them, code left out.

    Args:
        source: the folder that has them; None or a missing one has none.
        target: made if there are any.

    Raises:
        ValueError: one is larger than any tokenizer.
    """
    if source is None or not source.is_dir():
        return
    found = {file for pattern in PATTERNS for file in source.glob(pattern) if file.is_file() and file.suffix != ".py"}
    for file in sorted(found):
        if file.stat().st_size > SIZE_LIMIT:
            raise ValueError(f"{file}: {file.stat().st_size} bytes; at most {SIZE_LIMIT} are copied")
        target.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.name)
