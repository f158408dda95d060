#!/usr/bin/env bash
# Makes .venv from requirements.lock. A second run finds the stamp and returns at once.
#   TORCH=cuda (default: what the lock names) | cpu | rocm, the last two with TORCH_INDEX=<address of a package index>
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
choice=$venv/.modm-torch
# A later `make test` or `make demo` says nothing of torch: what was chosen once stays.
if [ -z "${TORCH:-}" ] && [ -f $choice ]; then
  { read -r TORCH; read -r index; } <$choice
  TORCH_INDEX=${TORCH_INDEX:-$index}
fi
torch=${TORCH:-cuda}
uv_pin=uv==0.13.9

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

case $torch in
  cuda) ;;
  cpu | rocm) [ -n "${TORCH_INDEX:-}" ] || die "TORCH=$torch needs TORCH_INDEX, a package index that holds those builds of torch" ;;
  *) die "TORCH=$torch is unknown; use cuda, cpu or rocm" ;;
esac

if [ ! -x $venv/bin/python ]; then
  # A pyenv shim may be on PATH without a Python behind it, so each candidate has to prove itself.
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; then
      python=$candidate
      break
    fi
  done
  [ -n "${python:-}" ] || die "needs Python 3.11 or 3.12 with its venv module; set PYTHON to one"
  say "making $venv with $($python --version)"
  "$python" -m venv $venv
fi

python_version=$($venv/bin/python -c 'import platform; print(platform.python_version())')
stamp=$venv/.modm-setup
want=$(printf '%s %s %s %s' "$python_version" "$torch" "${TORCH_INDEX:-}" "$PWD" | cat - pyproject.toml requirements.lock | cksum)
if [ -x $venv/bin/modm ] && [ "$(cat $stamp 2>/dev/null)" = "$want" ]; then
  exit 0
fi

# pip is told of a private certificate authority by PIP_CERT, uv by SSL_CERT_FILE; else uv takes the system's, as pip does.
if [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}; fi
for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
  if [ -z "${SSL_CERT_FILE:-}" ] && [ -f $bundle ]; then export SSL_CERT_FILE=$bundle; fi
done
export VIRTUAL_ENV=$PWD/$venv

$venv/bin/python -m pip --version >/dev/null 2>&1 || $venv/bin/python -m ensurepip >&2
if ! $venv/bin/python -m pip show -q "${uv_pin%%==*}" >/dev/null 2>&1; then
  say "installing $uv_pin"
  $venv/bin/python -m pip install --quiet --disable-pip-version-check "$uv_pin"
fi
uv=$venv/bin/uv

lock=requirements.lock
if [ -n "${TORCH_INDEX:-}" ]; then
  # The lock's hashes are those of the registry's CUDA build; torch and what it brings come from the given index instead.
  lock=$venv/requirements-without-torch.lock
  awk '/^[a-z0-9]/ { skip = /^(torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/ } !skip' requirements.lock >$lock
fi
say "installing $(grep -cE '^[a-z0-9].*==' $lock) locked packages (several GB the first time)"
# Compiled here once: where bytecode may not be written later, every process would spend seconds on it at each start.
$uv pip sync --compile-bytecode --require-hashes "$lock"
if [ -n "${TORCH_INDEX:-}" ]; then
  version() { sed -nE "s/^$1==([0-9.]+).*/\1/p" requirements.lock; }
  $uv pip install --index "$TORCH_INDEX" "torch==$(version torch)" "torchvision==$(version torchvision)"
fi
# uv's sync removes an editable project, so it is installed last. hatchling is in the lock: nothing is fetched here.
$uv pip install --quiet --no-deps --no-build-isolation -e .
printf '%s\n%s\n' "$torch" "${TORCH_INDEX:-}" >$choice
printf '%s\n' "$want" >$stamp
say "done: $venv, Python $python_version"
