"""Fetch what the other commands start from.

    python data_tools/download.py demo -o data/raw           106 Wikipedia articles; no network
    python data_tools/download.py wikitext-103 -o data/raw   WikiText-103, from the hub
    python data_tools/download.py spm -o data/raw            the public DeBERTa v3 vocabulary

The demo is the sample of a Wikipedia dump that the gensim package ships. Files from the hub are
checked against their sha256.
"""

import argparse
import hashlib
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pyarrow.parquet as pq
from restart import write_file

SAMPLE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
HUB = "https://huggingface.co"
WIKITEXT = "Salesforce/wikitext"
WIKITEXT_FOLDER = "wikitext-103-raw-v1"
WIKITEXT_FILES = {  # what is written, and what it is made of: files and their sha256
    "wiki.train.raw": {
        "train-00000-of-00002.parquet": (
            "74da360f23826045b3e6ac6375411fdb15f003030aa74f2596ed08b857cb9212"
        ),
        "train-00001-of-00002.parquet": (
            "ba090ac30dbf5461e8dcbdd1a1b8e6f3cf9c2c756d64f0c1220450acd514f720"
        ),
    },
    "wiki.valid.raw": {
        "validation-00000-of-00001.parquet": (
            "204929b7ff9d6184953f867dedb860e40aa69c078fc1e54b3baaa8fb28511c4c"
        ),
    },
    "wiki.test.raw": {
        "test-00000-of-00001.parquet": (
            "5f1bea067869d04849c0f975a2b29c4ff47d867f484f5010ea5e861eab246d91"
        ),
    },
}
DEBERTA = "microsoft/deberta-v3-base"
DEBERTA_FILE = "spm.model"  # on the hub; here it has a name of its own, not that of your vocabulary
VOCABULARY = "deberta_v3.spm.model"
VOCABULARY_SHA256 = "c679fbf93643d19aab7ee10c0b99e460bdbc02fedf34b92b05af343b4af586fd"
NEXT = {
    "demo": "train_tokenizer.py -i {0}/*.bz2 -o {0}/spm.model --vocab_size 2048",
    "wikitext-103": "prepare_data.py -i {0}/wiki.train.raw --valid_input {0}/wiki.valid.raw ...",
    "spm": f"prepare_data.py --vocab {{0}}/{VOCABULARY} ...",
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
    for files in WIKITEXT_FILES.values():
        for name, sha256 in files.items():
            _check(source / name, sha256, f"{WIKITEXT}/{WIKITEXT_FOLDER}/{name}")
    return [
        _write_lines([source / file for file in files], folder / name)
        for name, files in WIKITEXT_FILES.items()
    ]


def fetch_vocabulary(folder: Path) -> list[Path]:
    """Download the vocabulary of the public DeBERTa v3 models."""
    path = folder / VOCABULARY
    what = f"{DEBERTA}/{DEBERTA_FILE}"
    if path.exists():
        _check(path, VOCABULARY_SHA256, what)
        return [path]
    try:
        source = Path(huggingface_hub.hf_hub_download(DEBERTA, DEBERTA_FILE))
    except OSError as error:
        raise _no_hub(
            error,
            f"{HUB}/{DEBERTA}/resolve/main/{DEBERTA_FILE}",
            f"at {path}, then go on with: python data_tools/{NEXT['spm'].format(folder)}",
        ) from None
    _check(source, VOCABULARY_SHA256, what)
    write_file(path, source.read_bytes())
    return [path]


def _check(path: Path, sha256: str, what: str) -> None:
    """Refuse a file that is not the published one."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ValueError(f"{path.parent} must have {path.name}, all of {what}") from None
    if found != sha256:
        raise ValueError(
            f"{path} must be {what} of the hub, with the sha256 {sha256}; it has {found}. "
            "Delete it, or move it away, and give the same command again."
        )


def _write_lines(sources: list[Path], path: Path) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as out:
        for source in sources:
            for batch in pq.ParquetFile(source).iter_batches(columns=["text"]):
                lines = batch.column(0).to_pylist()  # a blank line is an empty row
                out.writelines(line if line.endswith("\n") else line + "\n" for line in lines)
    return temporary.replace(path)


def _no_hub(reason: object, what: str, where: str) -> ValueError:
    reason = " ".join(str(reason).split())
    return ValueError(
        f"the hub does not answer ({reason}). Get {what} on another machine, and put it {where}"
    )


if __name__ == "__main__":
    sys.exit(main())
