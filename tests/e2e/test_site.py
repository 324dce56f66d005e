"""The pages as a site: no warning, nothing fetched from elsewhere, and the search finds something from the disk."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MKDOCS = ROOT / "build" / "docs" / "bin" / "mkdocs"


@pytest.mark.slow
@pytest.mark.skipif(not MKDOCS.exists(), reason="no site generator: make docs")
def test_the_site(tmp_path):
    command = [str(MKDOCS), "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0 and not built.stderr, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 70
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"\']?([^\"\'\s>]+)", text)
        fetched += re.findall(
            r"<link[^>]* rel=[\"\']?(?:stylesheet|icon|preconnect)[^>]* href=[\"\']?([^\"\'\s>]+)", text
        )
        assert not [address for address in fetched if "//" in address], page
    assert "posttrain.objectives.preference.dpo_loss" in (tmp_path / "api.html").read_text(encoding="utf-8")
