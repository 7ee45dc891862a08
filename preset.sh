#!/usr/bin/env bash
# Start a preset; rtd.sh and mlm.sh call this.
#
#   ./preset.sh OBJECTIVE PRESET [flags of run_pretrain.py; they win over the preset's recipe]
#
# Works from any folder: the default data are prepared beside this file, all other paths are the
# caller's. Takes the active virtual or conda environment, else a complete .venv beside this file,
# else the python in PATH; it never builds one.
set -euo pipefail
objective=$1
shift
here=$(cd "$(dirname "$0")" && pwd)

has_packages() { # PYTHON
    "$1" -c 'import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("torch", "deepspeed", "transformers", "sentencepiece"))))' 2>/dev/null
}

complete=
[ ! -e "$here/.venv/.complete" ] || complete=$here/.venv
found=
for folder in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$complete"; do
    if [ -z "$found" ] && [ -n "$folder" ] && has_packages "$folder/bin/python"; then
        found=$folder
        PATH=$folder/bin:$PATH
    fi
done
if [ -z "$found" ] && ! has_packages python; then
    echo "$objective.sh: no python here has the packages; run \`make setup\` in $here, or activate an environment with them" >&2
    exit 2
fi

if [ . -ef "$here" ]; then
    home=
else
    home=$here/
    export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
fi

for word in "$@"; do
    if [ "$word" = --help ] || [ "$word" = -h ]; then
        python -m ds_deberta.recipes "$objective" --help
        exec python "${home}run_pretrain.py" --help
    fi
done

python -m ds_deberta.recipes "$objective" "${1:-}" # no preset, or a wrong one: lists them, status 2
preset=$1
shift

words=" $* "
if [[ $words != *" --config"* ]]; then # a configuration names its own folders
    [[ $words == *" --output_dir"* ]] || set -- --output_dir "runs/$preset" "$@"
    if [[ $words != *" --data_dir"* ]]; then
        data=data/wikitext-103
        [[ $preset != *nano* ]] || data=data/demo
        [[ $words == *" --plan"* ]] || # needs no data
            make --silent --directory "$here" DATA_PYTHON="$(command -v python)" "$data/manifest.json"
        set -- --data_dir "$home$data" "$@"
    fi
fi

# shellcheck disable=SC2086 # the launcher's options are words
exec python -m ds_deberta.launch ${DEEPSPEED_ARGS:-} "${home}run_pretrain.py" --objective "$objective" --model "$preset" "$@"
