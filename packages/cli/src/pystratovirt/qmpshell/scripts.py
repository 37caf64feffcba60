"""Completion scripts for the shells of the system: `eval "$(qmp completion bash)"`.

They ask `qmp __complete WORD… ` at each Tab, so they never go out of date.
"""

from __future__ import annotations

from typing import Final

BASH: Final = """\
_qmp() {
    # Not COMP_WORDS: bash breaks words at "=" and ":".
    local line=${COMP_LINE:0:COMP_POINT} words cur
    read -ra words <<< "$line"
    [[ $line == *' ' ]] && words+=('')
    cur=${words[-1]}
    local IFS=$'\\n'
    COMPREPLY=($(qmp __complete -- "${words[@]:1}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace 2>/dev/null
    # What stands before a break stays on the line, so it must not be said again.
    [[ $cur == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${cur%"${cur##*=}"}"}")
    return 0
}
complete -o default -F _qmp qmp
"""

ZSH: Final = """\
#compdef qmp
_qmp() {
    local -a found ended
    found=("${(@f)$(qmp __complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    ended=("${(@)found:#*[=.]}")
    found=("${(@M)found:#*[=.]}")
    compadd -- $ended
    compadd -S '' -- $found
    (( $#ended + $#found )) || _files
}
compdef _qmp qmp
"""

FISH: Final = """\
complete -c qmp -f -a '(qmp __complete -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
complete -c qmp -s s -l socket -r -F
"""

SCRIPTS: Final = {"bash": BASH, "zsh": ZSH, "fish": FISH}
