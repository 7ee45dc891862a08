"""Build an extension of torch in a folder, as DeepSpeed builds its own, and say what it answers."""

import ctypes
import sys
from pathlib import Path

from torch.utils import cpp_extension

from ds_deberta.builds import use_batons

SOURCE = 'extern "C" int answer() { return 42; }\n'


def main() -> None:
    folder = Path(sys.argv[1])
    source = folder / "answer.cpp"
    if not source.exists():
        source.write_text(SOURCE)
    use_batons()
    cpp_extension.load("answer", [str(source)], build_directory=str(folder), is_python_module=False)
    sys.stdout.write(f"{ctypes.CDLL(str(folder / 'answer.so')).answer()}\n")


if __name__ == "__main__":
    main()
