# shellcheck shell=bash
# Sourced by the scripts that run jax, from the repository's root: how jax and the allocator behave.

# Without an accelerator's plugin jax has only the CPU; saying so spares its search for others
# and the warnings about it. Where a plugin is installed, jax chooses.
if [[ -z "${JAX_PLATFORMS+set}" ]] &&
  ! compgen -G ".venv/lib*/python*/site-packages/jax_plugins/*" >/dev/null &&
  ! compgen -G ".venv/lib*/python*/site-packages/libtpu*" >/dev/null; then
  export JAX_PLATFORMS=cpu
fi

# XLA's CPU allocates anew in every step; with huge pages the kernel maps and zeroes that memory
# quickly (training is a quarter faster). Without effect where glibc or the kernel has none.
if [[ "$(uname)" == Linux ]]; then
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
fi
