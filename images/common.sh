# Sourced by the recipes: where results go, how they are kept, how a recipe fails.
#
# A result is a folder $EVOLUTE_CACHE/images/NAME-KEY, where KEY is a hash of the recipe's own files.
# It is built aside and renamed into place once its SHA256SUMS are written, so a folder that exists is
# complete; an interrupted build leaves only a .building folder behind, which the next one removes.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${EVOLUTE_CACHE:-$HOME/.cache/evolute}/images

# Everything a result is made from (this file only keeps results). The kernel's recipe is part of the initramfs's, which holds its modules.
recipe_files() {
    case $1 in
    kernel) echo kernel.sh ;;
    initramfs) echo kernel.sh initramfs.sh guest/init guest/agent ;;
    debian) echo debian.sh guest/agent guest/agent.service guest/customize-debian ;;
    *) fail "there is no image called '$1'; there are: kernel, initramfs, debian" ;;
    esac
}

folder_of() {
    local files
    files=$(recipe_files "$1")
    # shellcheck disable=SC2086 # a list of words on purpose
    echo "$cache/$1-$(cd "$here" && sha256sum $files | sha256sum | cut -c1-16)"
}

say() { printf 'images: %s\n' "$*" >&2; }
fail() {
    printf 'images: error: %s\n' "$*" >&2
    exit 1
}

# need PROGRAM PACKAGE [PROGRAM PACKAGE]...: all of them, or one error that names every missing package.
need() {
    local missing=()
    while [ $# -gt 0 ]; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || missing+=("$2")
        shift 2
    done
    [ ${#missing[@]} -eq 0 ] && return
    fail "missing packages. Install them with:
    sudo apt-get install --no-install-recommends $(printf '%s\n' "${missing[@]}" | sort -u | tr '\n' ' ')"
}

# intact FOLDER: its files are the ones that were built.
intact() { (cd "$1" && sha256sum --quiet --check SHA256SUMS) >&2; }

# make_result NAME: runs `build FOLDER` of the calling recipe unless its result is there and intact.
make_result() {
    local name=$1 target started=$SECONDS
    target=$(folder_of "$name")
    mkdir -p "$cache"
    # Two clones may build at once; the second waits and then finds the result.
    exec 9>"$cache/.lock-$name"
    flock --nonblock 9 || { say "$name: somebody else is building, waiting" && flock 9; }
    if [ -e "$target/SHA256SUMS" ]; then
        if intact "$target"; then
            say "$name: there ($target)"
            return
        fi
        say "$name: the cached files no longer match their checksums, building again"
        rm -rf "$target"
    fi
    rm -rf "$cache/.building-$name".*
    building=$(mktemp -d "$cache/.building-$name.XXXXXX")
    trap 'rm -rf "$building"' EXIT # not a local: it outlives this function
    chmod 755 "$building"
    mkdir "$building/out" "$building/work"
    build "$building/out" "$building/work"
    (cd "$building/out" && find . -type f -printf '%P\0' | sort -z | xargs -0 sha256sum >../SHA256SUMS)
    mv "$building/SHA256SUMS" "$building/out/"
    mv "$building/out" "$target"
    say "$name: done in $((SECONDS - started)) s, $(du -sh "$target" | cut -f1) ($target)"
}
