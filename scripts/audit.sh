#!/usr/bin/env bash
# What UPS-RM is made of, and whether anything in it is known to be vulnerable.
# Usage: bash scripts/audit.sh [sbom|vulnerabilities|lock]     without a word: sbom, then vulnerabilities
#   sbom             runs/audit/sbom.json: CycloneDX 1.6 of what is installed, with licences. Works offline.
#   vulnerabilities  pip-audit over requirements.lock; fails where the advisory service can't be asked. Needs the network.
#   lock             requirements.lock anew from pyproject.toml and constraints.txt. Needs the network.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$repo/scripts/setup.sh"
setup_venv "$repo" "dev,verl,trl,audit"
cd "$repo"

sbom() {
  mkdir -p runs/audit
  "$venv/bin/cyclonedx-py" environment "$venv/bin/python" --pyproject pyproject.toml --mc-type application \
    --spec-version 1.6 --output-format JSON --output-reproducible --validate --output-file runs/audit/sbom.json
  echo "runs/audit/sbom.json: $(grep -c '"purl"' runs/audit/sbom.json) packages"
}

vulnerabilities() {
  # --strict: a package that can't be looked up is a failure, not a package without vulnerabilities
  "$venv/bin/pip-audit" --strict --disable-pip --require-hashes --requirement requirements.lock
}

lock() {
  {
    echo "# constraints.txt with the sha256 of every file, and what torch pins itself. Made by: bash scripts/audit.sh lock"
    "$venv/bin/uv" pip compile --quiet --universal --python-version 3.10 --extra dev --extra verl --extra trl --extra audit \
      --constraint constraints.txt --generate-hashes --no-annotate --no-header --no-emit-index-url pyproject.toml
  } >.requirements.lock.tmp
  mv .requirements.lock.tmp requirements.lock
}

case "${1:-all}" in
  sbom | vulnerabilities | lock) "$1" ;;
  all) sbom && vulnerabilities ;;
  *)
    echo "bash scripts/audit.sh [sbom|vulnerabilities|lock]" >&2
    exit 2
    ;;
esac
