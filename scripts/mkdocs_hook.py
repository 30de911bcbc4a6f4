"""For mkdocs: pages link to files of the repository, which the site then has, too; folders are named without a link."""

import re
from pathlib import Path

from mkdocs.structure.files import File

LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)\)")
ROOT = Path(__file__).parent.parent


def on_files(files, config):
    linked = {name for page in Path(config.docs_dir).glob("*.md") for _, _, name in LINK.findall(page.read_text())}
    for name in sorted(linked):
        if (ROOT / name).is_file():
            files.append(File.generated(config, _on_site(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, **_):
    return LINK.sub(
        lambda found: f"{found[1]}[{found[2]}]({_on_site(found[3])})" if (ROOT / found[3]).is_file() else f"`{found[3]}`", markdown
    )


def _on_site(name: str) -> str:
    """Where the site has a file. Code is text there: a browser would not show it otherwise, and mkdocs would make a page of Markdown."""
    return f"repository/{name}" if Path(name).suffix in (".png", ".csv") else f"repository/{name}.txt"
