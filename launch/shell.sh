# shellcheck shell=bash
# What the launch scripts have in common: flags, quoting, and sentences for what is wrong. To be sourced.

program=${0##*/}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
COMMAND=()

say() { printf '%s: %s\n' "$program" "$*" >&2; }

fail() { # fail STATUS SENTENCE
  local status=$1
  shift
  say "$@"
  exit "$status"
}

# The words as one line of shell: pasted, or sent to another machine, it gives the same words again.
quote() {
  local LC_ALL=C word apostrophe="'\\''" line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//"'"/"$apostrophe"}'"
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command, or, with --dry_run, prints it.
step() {
  if [[ ${dry_run:-} ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# read_flags REQUIRED OPTIONAL SWITCHES ARGUMENTS... puts --name=value in $name, "yes" in the variable of a switch, and what
# follows -- in COMMAND. --help prints the comment the script begins with.
read_flags() {
  local required=$1 optional=$2 switches=$3 argument flag
  shift 3
  while (($#)); do
    argument=$1 flag=${1%%=*} flag=${flag#--}
    shift
    case $argument in
      --)
        COMMAND=("$@")
        break
        ;;
      --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
      --*) [[ $flag =~ ^[a-z_]+$ ]] || fail 2 "unknown flag $(quote "$argument"); --help lists them" ;;
      *) fail 2 "unknown argument $(quote "$argument"); flags are written --name=value, and the command follows --" ;;
    esac
    if [[ " $switches " == *" $flag "* ]]; then
      [[ $argument == "--$flag" ]] || fail 2 "--$flag has no value; found $(quote "$argument")"
      printf -v "$flag" yes
    elif [[ " $required $optional " == *" $flag "* ]]; then
      [[ $argument == --*=* ]] || fail 2 "--$flag needs a value: --$flag=..."
      printf -v "$flag" %s "${argument#*=}"
    else
      fail 2 "unknown flag --$flag; --help lists them"
    fi
  done
  for flag in $required; do
    [[ ${!flag} ]] || fail 2 "--$flag is missing; --help tells of it"
  done
  ((${#COMMAND[@]})) || fail 2 "the command is missing; it follows --"
}

# expect FLAG PATTERN WORDS: refuses a value that does not look as it should.
expect() {
  local LC_ALL=C
  [[ ${!1} =~ ^($2)$ ]] || fail 2 "--$1 is $(quote "${!1}"); expected $3"
}

need() { # need TOOL
  [[ ${dry_run:-} ]] || command -v "$1" >/dev/null || fail 1 "found no $1 on PATH; it has to be installed first"
}

# What is copied to other machines is the last commit: so that what ran there has a name.
need_commit() {
  local changed
  changed=$(git -C "$root" status --porcelain --untracked-files=no) || fail 1 "$root is no git checkout; its last commit is what is copied"
  [[ -z $changed || ${dry_run:-} ]] || fail 1 "$root has changes that are not committed ($(quote "${changed%%$'\n'*}")); the last commit is what is copied"
}
