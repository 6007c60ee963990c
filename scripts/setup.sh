# Sourced by the other scripts: setup_venv REPO EXTRAS makes REPO/.venv from constraints.txt, once per set of extras.

setup_venv() {
  local repo="$1" extras="$2" python="${PYTHON:-python3}" want stamp
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "UPS-RM needs Python >= 3.10; set PYTHON=/path/to/python3 (found: $("$python" --version 2>&1 || echo none))" >&2
    return 1
  fi
  stamp="$repo/.venv/.ups_rm_installed"
  want="$(cat "$repo/pyproject.toml" "$repo/constraints.txt" | cksum)"
  # an environment with more extras serves a command that needs fewer
  if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$want" ] && { [ -z "$extras" ] || grep -qx -- "$extras" "$stamp"; }; then
    return 0
  fi
  [ -x "$repo/.venv/bin/python" ] || "$python" -m venv "$repo/.venv"
  echo "installing into .venv (once)"
  "$repo/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar off \
    -c "$repo/constraints.txt" "torch" -e "$repo${extras:+[$extras]}"
  printf '%s\n%s\n' "$want" "$extras" >"$stamp"
}
