"""Draws the Mermaid diagram of a page of docs/ as an SVG beside it, which the site shows without any script.

python docs/diagram.py architecture mermaid/dist/mermaid.min.js     (npm install mermaid; needs chromium)
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
PAGE = """<script src="{script}"></script><div id="out"></div><script>
mermaid.initialize({{startOnLoad: false, htmlLabels: false, flowchart: {{htmlLabels: false, wrappingWidth: 320}}}});
mermaid.render("diagram", {text}).then(made => document.getElementById("out").innerHTML = made.svg);</script>"""


def main(name: str, script: str) -> None:
  """Writes docs/NAME.svg."""
  from mkdocs_pages import diagram_sum

  text = re.search(r"(?s)```mermaid\n(.*?)```", (DOCS / f"{name}.md").read_text())[1]
  with tempfile.TemporaryDirectory() as folder:
    page = pathlib.Path(folder) / "page.html"
    page.write_text(PAGE.format(script=pathlib.Path(script).resolve().as_uri(), text=json.dumps(text)))
    command = ["chromium", "--headless", "--no-sandbox", "--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  svg = re.search(r'(?s)<div id="out">(<svg.*?</svg>)</div>', dom)[1].replace("<br>", "<br/>")
  (DOCS / f"{name}.svg").write_text(f"<!-- {diagram_sum(text)} -->\n{svg}\n")


if __name__ == "__main__":
  main(*sys.argv[1:])
