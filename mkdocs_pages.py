"""Hooks of mkdocs.yml: pages that stand elsewhere in the repository, and pictures of the Mermaid diagrams."""

import hashlib
import pathlib
import posixpath
import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent
# Page of the site, for files that are no page of docs/.
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"} | {
  path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix()
  for path in (*ROOT.glob("benchmarks/*.md"), ROOT / "launch/README.md")
}


def on_files(files, config):
  """Adds the pages that stand elsewhere."""
  for path, page in ELSEWHERE.items():
    files.append(File.generated(config, page, content=(ROOT / path).read_text()))
  return files


def on_page_markdown(markdown, page, config, files):
  """Turns links between files of the repository into links between pages, with their titles for file names, and diagrams
  into their pictures."""
  own = page.file.src_uri
  origin = {to: path for path, to in ELSEWHERE.items()}.get(own, f"docs/{own}")

  def link(found):
    target, _, anchor = found[2].partition("#")
    if not target or ":" in target:
      return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    to = ELSEWHERE.get(path, path.removeprefix("docs/"))
    text = f"[{files.src_uris[to].page.title}" if found[1] else ""
    return f"{text}]({posixpath.relpath(to, posixpath.dirname(own) or '.')}{'#' + anchor if anchor else ''})"

  def picture(found):
    name = f"{pathlib.PurePath(own).stem}.svg"
    if diagram_sum(found[1]) not in (ROOT / "docs" / name).read_text():
      raise PluginError(f"docs/{name} is not of the diagram in {origin}: python docs/diagram.py says how to make it")
    return f"![The diagram]({name}){{ .diagram }}"

  markdown = re.sub(r"(\[[\w./]+\.md)?\]\(([^)\s]+)\)", link, markdown)
  return re.sub(r"(?s)```mermaid\n(.*?)```", picture, markdown)


def on_page_content(html, page, config, files):
  """Keeps the hyphens of an option and its first word on one line."""
  return re.sub(r"(?<=[\s>(])--\w+", r'<span class="option">\g<0></span>', html)


def diagram_sum(text: str) -> str:
  """What the picture of a diagram carries, so that an old one is found."""
  return hashlib.sha256(text.encode()).hexdigest()
