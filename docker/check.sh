#!/usr/bin/env bash
# Executes the steps of docker/Dockerfile.cpu where no container engine runs: each stage in a fresh Debian of its own, made
# by debootstrap, as the image's base has it. Then, as the image's user, runs three steps of the recipe in what came out.
#
#   docker/check.sh [FOLDER]      as root; needs debootstrap, 15 GiB below FOLDER (default: /tmp) and package indexes
#
# Debian 12's own Python 3.11 stands in for that of the base image. PIP_… variables and pip's configuration of the host are
# passed on, as are folders that PIP_FIND_LINKS names; TORCH_INDEX overrides the Dockerfile's.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
file=$repository/docker/Dockerfile.cpu
[[ $(id -u) = 0 ]] || { echo "only root may make and enter another root" >&2; exit 2; }
command -v debootstrap > /dev/null || { echo "install debootstrap first" >&2; exit 2; }
work=$(mktemp -d "${1:-/tmp}/rlsys-image.XXXXXX")

# shellcheck disable=SC2329 # a trap calls it
clean() {
  local at
  while read -r at; do
    umount --lazy "$at"
  done < <(awk -v below="$work/" 'index($2, below) == 1 { print $2 }' /proc/mounts | sort -r)
  rm -rf --one-file-system "$work"
}
trap clean EXIT

fresh_debian() { # its root
  local at
  if [[ ! -d $work/debian ]]; then
    {
      debootstrap --variant=minbase --include=ca-certificates bookworm "$work/debian" \
        && chroot "$work/debian" apt-get install --yes --no-install-recommends python3.11 python3.11-venv python3.11-dev \
        && ln -s python3.11 "$work/debian/usr/bin/python"
    } > "$work/debian.log" 2>&1 || { tail "$work/debian.log" >&2; exit 1; }
  fi
  cp -a "$work/debian" "$1"
  for at in /proc /sys /dev; do
    mount --rbind "$at" "$1$at"
    mount --make-rslave "$1$at"
  done
  mount -t tmpfs tmpfs "$1/dev/shm"
  cp -L /etc/resolv.conf "$1/etc/resolv.conf"
  for at in /etc/pip.conf "${PIP_CERT:-}" ${PIP_FIND_LINKS:-} $(awk '/^file:/ { sub("file://", "", $1); print $1 } /file:/ {
      for (i = 1; i <= NF; i++) if ($i ~ /^file:/) { sub("file://", "", $i); print $i } }' /etc/pip.conf 2>/dev/null); do
    [[ -e $at ]] || continue
    mkdir -p "$1$(dirname "$at")"
    if [[ -d $at ]]; then
      mkdir -p "$1$at"
      mount --rbind "$(readlink -f "$at")" "$1$at"
    else
      cp -L "$at" "$1$at"
    fi
  done
}

in_root() { # ROOT USER SCRIPT
  local line=() variable
  for variable in $(compgen -e | grep '^PIP_'); do
    line+=("$variable=${!variable}")
  done
  chroot --userspec="$2" "$1" /usr/bin/env -i HOME="/root" PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin \
    "${line[@]}" "${environment[@]}" bash -o pipefail -euc "cd '$folder'; $3"
}

copy() { # from the repository or another stage, as COPY does
  local from=$repository words
  read -ra words <<< "$1"
  if [[ ${words[0]} = --from=* ]]; then
    from=$work/${words[0]#--from=}
    words=("${words[@]:1}")
  fi
  local target=$root${words[-1]} source
  mkdir -p "$(dirname "$target")"
  [[ ${words[-1]} = */ ]] && mkdir -p "$target"
  for source in "${words[@]:0:${#words[@]}-1}"; do
    cp -aT "$from/${source#/}" "$([[ -d $target && ${words[-1]} = */ ]] && echo "$target$(basename "$source")" || echo "$target")"
  done
}

root='' environment=() folder=/ user=0:0 stage=0
while IFS=$'\t' read -r word rest; do
  echo "== $word $rest"
  case $word in
    FROM)
      stage=$((stage + 1)) environment=() folder=/ user=0:0
      name=$stage
      [[ $rest = *" AS "* ]] && name=${rest##* AS }
      root=$work/$name
      fresh_debian "$root"
      ;;
    SHELL | CMD) ;;
    ARG) # a value of the caller's environment stands before the Dockerfile's
      variable=${rest%%=*}
      environment+=("$variable=${!variable:-${rest#*=}}")
      ;;
    ENV)
      for setting in $rest; do
        environment+=("${setting//\$PATH//usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin}")
      done
      ;;
    COPY) copy "$rest" ;;
    RUN) in_root "$root" "$user" "$rest" < /dev/null ;;
    WORKDIR) folder=$rest && mkdir -p "$root$rest" ;;
    USER) user=$rest ;;
    *) echo "docker/check.sh does not know $word" >&2 && exit 2 ;;
  esac
done < <(python3 "$repository/docker/steps.py" "$file")

echo "== the image: $(du -sxh --exclude=proc --exclude=sys --exclude=dev "$root" | cut -f1), of which /opt/rlsys has $(du -sxh "$root/opt/rlsys" | cut -f1)"
environment+=(HOME=/home/rlsys)
in_root "$root" "$user" "test \"\$(id -u)\" = 1000 && ! touch /opt/rlsys/owned 2> /dev/null"
in_root "$root" "$user" "python -m rlsys.launch +recipe=grpo_qwen steps=3 data.prompts_per_step=4 eval.every=0"
echo "docker/check.sh: the steps of Dockerfile.cpu gave an image that trains"
