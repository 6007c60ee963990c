# Sourced by the other scripts: setup_venv REPO EXTRAS makes REPO/.venv from constraints.txt, once per set of extras, and
# sets `venv` to it. With UPS_RM_VENV=FOLDER that environment is used as it is and nothing is installed.

setup_venv() {
  local repo="$1" extras="$2" python="${PYTHON:-python3}" want stamp show=(--quiet --progress-bar off)
  venv="${UPS_RM_VENV:-$repo/.venv}"
  if [ -n "${UPS_RM_VENV:-}" ]; then
    [ -x "$venv/bin/ups-rm" ] && return 0
    echo "UPS_RM_VENV=$venv has no bin/ups-rm: install UPS-RM there, or unset it to have .venv made" >&2
    return 1
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "UPS-RM needs Python >= 3.10; set PYTHON=/path/to/python3 (found: $("$python" --version 2>&1 || echo none))" >&2
    return 1
  fi
  stamp="$venv/.ups_rm_installed"
  want="$(cat "$repo/pyproject.toml" "$repo/constraints.txt" | cksum) $repo"
  # an environment with more extras serves a command that needs fewer
  if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$want" ] && { [ -z "$extras" ] || grep -qx -- "$extras" "$stamp"; }; then
    return 0
  fi
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv" || {
      echo "no virtual environment could be made; on Debian and Ubuntu the package python3-venv is missing" >&2
      return 1
    }
  fi
  if [ -t 1 ]; then show=(); fi
  echo "installing into ${venv#"$PWD"/} (once, some minutes)"
  "$venv/bin/python" -m pip install "${show[@]+"${show[@]}"}" --disable-pip-version-check --timeout 60 --retries 5 \
    -c "$repo/constraints.txt" torch -e "$repo${extras:+[$extras]}" || return 1
  printf '%s\n%s\n' "$want" "$extras" >"$stamp"
}
