#!/usr/bin/env bash
# Runs the laptop's section of docs/quickstart.md in a clean clone, and says how long it took.
#
#   bash docs/quickstart.sh [REPOSITORY] [FOLDER]    # by default a clone of this one in a temporary folder
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
repository=${1:-$here}
folder=${2:-$(mktemp -d)/raybsa}

SECONDS=0
git clone --quiet "$repository" "$folder"
cd "$folder"
unset PYTHONPATH
awk '/^## /{laptop=/laptop/} /^```/{inside=laptop && /^```sh/; next} inside' docs/quickstart.md | bash -euo pipefail -v
test -s results/mine/front/01/best.json
echo "from git clone to a search with a pattern of one's own: $((SECONDS / 60)) min $((SECONDS % 60)) s, in $folder"
