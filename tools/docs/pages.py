"""Pages of the site that do not stand in docs/: an mkdocs hook.

The README becomes the first page, files that pages link to come along, and the reference pages are
made of the package's docstrings and of what the command says of itself.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

import mustafar

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
LINK = re.compile(r"(?P<before>!?\[[^\]]*\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
GROUPS = {
    "Models and sessions": ["Model", "Session", "Chat", "Stream", "ChatStream"],
    "Many requests at once": ["Engine", "Request", "EngineStats"],
    "Settings": ["KVConfig", "SamplingParams", "kv_presets"],
    "Results": ["GenerateResult", "GenerateStats", "TokenLogprob", "MemoryUsage", "ModelMemory"],
    "Text": ["Tokenizer", "ChatTemplate"],
    "Calibration": ["Profile", "auto_profile", "calibrate"],
    "Quantised folders": ["quantize", "QuantizeResult"],
    "Compressed blocks": ["CompressedBlocks", "compress", "decompress"],
    "Errors": [],  # every exception
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    docs = {Path(page.abs_src_path): page.src_uri for page in files.documentation_pages()}
    for source, uri in PAGES.items():
        docs[ROOT / source] = uri
        files.append(File.generated(config, uri, content=(ROOT / source).read_text()))
    for source in docs:
        for link in LINK.finditer(source.read_text()):
            target = (source.parent / link["target"]).resolve()
            if target.is_file() and files.get_file_from_path(_uri_of(target, config)) is None:
                files.append(
                    File.generated(
                        config,
                        _uri_of(target, config),
                        content=target.read_bytes(),
                        inclusion=InclusionLevel.NOT_IN_NAV,
                    )
                )
    files.append(File.generated(config, "reference/python.md", content=_python_page()))
    files.append(File.generated(config, "reference/cli.md", content=_command_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Links as they hold on the site; those to folders, which have no page, become words."""
    uri = page.file.src_uri
    sources = {moved: ROOT / source for source, moved in PAGES.items()}
    source = sources.get(uri, Path(config.docs_dir) / uri)

    def move(link: re.Match[str]) -> str:
        target = (source.parent / link["target"]).resolve()
        if ":" in link["target"] or not target.exists():
            return link[0]  # where a file is missing, mkdocs says so
        if target.is_dir():
            return link["before"].strip("[]")
        moved = os.path.relpath(_uri_of(target, config), Path(uri).parent)
        return f"{link['before']}({moved}{link['anchor'] or ''})"

    return LINK.sub(move, markdown)


def on_page_content(html: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Without the marks that docstrings put before names (:class:, :meth:)."""
    return re.sub(r":(?:attr|class|func|meth):(?=<code>)", "", html)


def _uri_of(target: Path, config: MkDocsConfig) -> str:
    docs = Path(config.docs_dir).resolve()
    if target.is_relative_to(docs):
        return target.relative_to(docs).as_posix()
    uri = target.relative_to(ROOT).as_posix()
    return PAGES.get(uri, f"files/{uri}")


def _python_page() -> str:
    """All that the package exports, in groups."""
    public = {name: getattr(mustafar, name) for name in mustafar.__all__ if name[0] != "_"}
    errors = [
        name
        for name, value in public.items()
        if inspect.isclass(value) and issubclass(value, Exception)
    ]
    groups = {**GROUPS, "Errors": sorted(errors)}
    missing = set(public) - {name for names in groups.values() for name in names}
    if missing:
        raise SystemExit(f"tools/docs/pages.py has no group for {', '.join(sorted(missing))}")
    page = "# Python\n\n" + (inspect.getdoc(mustafar) or "").replace("::\n", ":\n") + "\n"
    for title, names in groups.items():
        page += f"\n## {title}\n\n"
        for name in names:
            if title == "Errors":
                page += _error_entry(name, public[name])
            elif public[name].__module__.endswith("_core"):
                page += _native_entry(name, public[name])
            else:
                page += f"::: {public[name].__module__}.{name}\n\n"
    return page


def _error_entry(name: str, error: type[Exception]) -> str:
    base = error.__bases__[0].__name__
    return f"- `{name}`, a `{base}`\n"


def _native_entry(name: str, cls: type) -> str:
    """A class of the extension module, whose docstrings begin with a signature."""
    entry = f"### {name} {{#mustafar.{name}}}\n\n{inspect.getdoc(cls) or ''}\n\n"
    for member, value in vars(cls).items():
        doc = inspect.getdoc(value) or ""
        if member.startswith("_") and member != "__init__" or not doc:
            continue
        signature, _, text = doc.partition("\n")
        if isinstance(value, property) or "(" not in signature:
            signature, text = member, doc
        signature = re.sub(r"self: [\w.]+(, )?", "", signature).replace("mustafar._core.", "")
        signature = signature.replace("__init__(", f"{name}(").removesuffix(" -> None")
        entry += f"```python\n{signature}\n```\n\n{text.strip()}\n\n"
    return entry


def _command_page() -> str:
    """What `mustafar --help` and every sub-command's say."""

    def help_of(*words: str) -> str:
        command = ["mustafar", *words, "--help"]
        # Two of them run in a Python that has the packages of their extra: this one.
        environment = {**os.environ, "COLUMNS": "100", "MUSTAFAR_PYTHON": sys.executable}
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stdout.rstrip()

    whole = help_of()
    page = f"# Command line\n\n```text\n{whole}\n```\n"
    listed = re.split(r"^subcommands:", whole, flags=re.IGNORECASE | re.MULTILINE)[-1]
    for name in re.findall(r"^ {2}(?!mustafar)([\w-]+)(?= )", listed, re.MULTILINE):  # no examples
        page += f"\n## mustafar {name}\n\n```text\n{help_of(name)}\n```\n"
    return page
