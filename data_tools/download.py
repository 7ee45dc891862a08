"""Fetch what the other commands start from.

    python data_tools/download.py demo -o data/raw           106 Wikipedia articles; no network
    python data_tools/download.py wikitext-103 -o data/raw   WikiText-103, from the hub
    python data_tools/download.py spm -o data/raw            the public DeBERTa v3 vocabulary

The demo is the sample of a Wikipedia dump that the gensim package ships.
"""

import argparse
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
HUB = "https://huggingface.co"
WIKITEXT = "Salesforce/wikitext"
WIKITEXT_FOLDER = "wikitext-103-raw-v1"
WIKITEXT_FILES = {
    "train": "wiki.train.raw",
    "validation": "wiki.valid.raw",
    "test": "wiki.test.raw",
}
DEBERTA = "microsoft/deberta-v3-base"
NEXT = {
    "demo": "train_tokenizer.py -i {0}/*.bz2 -o {0}/spm.model --vocab_size 2048",
    "wikitext-103": "prepare_data.py -i {0}/wiki.train.raw --valid_input {0}/wiki.valid.raw ...",
    "spm": "prepare_data.py --vocab {0}/spm.model ...",
}


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = {"demo": copy_demo, "wikitext-103": fetch_wikitext, "spm": fetch_vocabulary}
    parser.add_argument("what", choices=sources)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to put it in")
    args = parser.parse_args()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for path in sources[args.what](args.output):
            print(path)
        print(f"go on with: python data_tools/{NEXT[args.what].format(args.output)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def copy_demo(folder: Path) -> list[Path]:
    """Copy the sample dump out of the installed gensim."""
    gensim = find_spec("gensim")
    if gensim is None or gensim.origin is None:
        raise ValueError("the demo text is a part of gensim; install it: pip install gensim")
    sample = Path(gensim.origin).parent / "test" / "test_data" / SAMPLE
    if not sample.is_file():
        raise ValueError(
            f"this gensim lacks {sample}; install one with it: pip install gensim==4.4.0"
        )
    return [Path(shutil.copyfile(sample, folder / "enwiki-sample.xml.bz2"))]


def fetch_wikitext(folder: Path) -> list[Path]:
    """Download WikiText-103 and write it as the text files that it once was."""
    source = folder.absolute().parent / WIKITEXT_FOLDER  # beside the text, not to be read with it
    if not source.is_dir():
        try:
            pattern = f"{WIKITEXT_FOLDER}/*.parquet"
            cache = huggingface_hub.snapshot_download(
                WIKITEXT, repo_type="dataset", allow_patterns=pattern
            )
        except OSError as error:
            raise _no_hub(
                error,
                f"all of {HUB}/datasets/{WIKITEXT}/tree/main/{WIKITEXT_FOLDER}",
                f"in {source}, then give the same command again",
            ) from None
        source = Path(cache, WIKITEXT_FOLDER)
    return [_write_lines(source, split, folder / name) for split, name in WIKITEXT_FILES.items()]


def fetch_vocabulary(folder: Path) -> list[Path]:
    """Download the vocabulary of the public DeBERTa v3 models."""
    path = folder / "spm.model"
    try:
        huggingface_hub.hf_hub_download(DEBERTA, path.name, local_dir=folder)
    except OSError as error:
        raise _no_hub(
            error,
            f"{HUB}/{DEBERTA}/resolve/main/{path.name}",
            f"at {path}, then go on with: python data_tools/{NEXT['spm'].format(folder)}",
        ) from None
    return [path]


def _write_lines(source: Path, split: str, path: Path) -> Path:
    files = sorted(source.glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"{source} must have {split}-*.parquet files; it has none")
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as out:
        for file in files:
            try:
                for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
                    lines = batch.column(0).to_pylist()  # a blank line is an empty row
                    out.writelines(line if line.endswith("\n") else line + "\n" for line in lines)
            except pa.ArrowException as error:
                raise ValueError(f"{file} is damaged ({error}); delete it and try again") from None
    return temporary.replace(path)


def _no_hub(reason: object, what: str, where: str) -> ValueError:
    reason = " ".join(str(reason).split())
    return ValueError(f"no answer from the hub ({reason}). Get {what} elsewhere, put it {where}")


if __name__ == "__main__":
    sys.exit(main())
