"""The commands that the documentation prints, for the tests that check or run them."""

import os
import re

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = sorted(
    os.path.join(folder, name)
    for folder in ("", "docs", "benchmarks", "recordings")
    for name in os.listdir(os.path.join(ROOT, folder))
    if name.endswith(".md")
)


def read(page: str) -> str:
    """Reads a page, named by its path from the root."""
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        return file.read()


def bash_blocks(page: str) -> list[str]:
    """Lists the text of a page's bash blocks."""
    return re.findall(r"```bash\n(.*?)```", read(page), flags=re.DOTALL)


def commands(*pages: str) -> list[str]:
    r"""Lists every command in the bash blocks of some pages, in order.

    Continuation lines are joined, comments left out, and commands joined by && listed apart:
    "cmp a \<newline>    b && echo same  # all equal" gives ["cmp a b", "echo same"].
    """
    found = []
    for block in (block for page in pages for block in bash_blocks(page)):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#\s.*", "", line).strip()
            found += [re.sub(r"\s+", " ", part) for part in line.split(" && ") if part]
    return found
