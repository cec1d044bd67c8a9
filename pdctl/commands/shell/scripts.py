"""The completion scripts. Each passes the words up to the cursor to pdctl, which prints a line for each answer:
`value`, a tab, the value, a tab, its description; or `file` or `folder`, which the shell completes itself."""

from __future__ import annotations

import os
from pathlib import Path

_BASH = r"""# Completion of pdctl for bash 4.4 or newer.
_pdctl() {
    local kind value about
    COMPREPLY=()
    while IFS=$'\t' read -r kind value about; do
        case $kind in
            value)
                COMPREPLY+=("$value")
                [[ $value != *= ]] || compopt -o nospace
                ;;
            file) compopt -o default ;;
            folder) compopt -o dirnames ;;
        esac
    done < <(PDCTL_COMPLETION=bash "${1/#\~/$HOME}" "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
}
complete -F _pdctl pdctl
"""

_ZSH = r"""#compdef pdctl
# Completion of pdctl for zsh.
_pdctl() {
    local kind value about
    local -a values open
    local -i file=0 folder=0
    while IFS=$'\t' read -r kind value about; do
        case $kind in
            value)
                value=${value//:/\\:}${about:+:$about}
                if [[ ${value%%:*} == *= ]]; then open+=("$value"); else values+=("$value"); fi
                ;;
            file) file=1 ;;
            folder) folder=1 ;;
        esac
    done < <(PDCTL_COMPLETION=zsh "${(Q)words[1]/#\~/$HOME}" "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)
    if (( file || folder )); then
        compset -P '--*='
        if (( folder )); then _files -/; else _files; fi
        return
    fi
    (( $#values )) && _describe -V pdctl values
    (( $#open )) && _describe -V pdctl open -S ''
}
if [[ ${funcstack[1]} == _pdctl ]]; then _pdctl "$@"; else compdef _pdctl pdctl; fi
"""

_FISH = r"""# Completion of pdctl for fish.
function __pdctl_complete
    set -l words (commandline -opc)
    set -l last (commandline -ct)
    set -l name (string match -r -- '^--[^=]*=' $last)
    for line in (env PDCTL_COMPLETION=fish (string replace -r '^~' $HOME -- $words[1]) $words[2..] "$last" 2>/dev/null)
        set -l parts (string split \t -- $line)
        switch $parts[1]
            case value
                printf '%s\t%s\n' $parts[2] "$parts[3]"
            case file
                for path in (__fish_complete_path (string replace -r -- '^--[^=]*=' '' $last))
                    echo "$name$path"
                end
            case folder
                for path in (__fish_complete_directories (string replace -r -- '^--[^=]*=' '' $last) '')
                    echo "$name$path"
                end
        end
    end
end
complete -c pdctl -f -a '(__pdctl_complete)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def place_of(shell: str) -> Path:
    """The file in which this user's shell looks for completions of pdctl."""
    data, config = _folder("XDG_DATA_HOME", ".local/share"), _folder("XDG_CONFIG_HOME", ".config")
    return {
        "bash": data / "bash-completion/completions/pdctl",
        "zsh": data / "zsh/site-functions/_pdctl",
        "fish": config / "fish/completions/pdctl.fish",
    }[shell]


def _folder(variable: str, fallback: str) -> Path:
    value = Path(os.environ.get(variable, ""))
    return value if value.is_absolute() else Path.home() / fallback
