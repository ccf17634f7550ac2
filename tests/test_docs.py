"""Pages point at what is there, and every page is found from the list of pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vssl_dist
from vssl_dist import run_folder

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    targets = [target.partition("#")[0] for target in _LINK.findall(page.read_text())]
    inside = [target for target in targets if target and "://" not in target]
    assert [target for target in inside if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = set(_LINK.findall((ROOT / "docs" / "README.md").read_text()))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= listed


def test_the_page_of_the_run_folder_is_what_its_module_prints() -> None:
    page = (ROOT / "docs" / "run_folder.md").read_text()
    assert page.endswith(f"\n\n{run_folder.markdown()}"), "python -m vssl_dist.run_folder"
    assert len(run_folder.markdown().splitlines()) == 2 + len(run_folder._REMOVAL_RULES)


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {vssl_dist.__version__}\n" in citation
    assert "\nlicense: Apache-2.0\n" in citation
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
