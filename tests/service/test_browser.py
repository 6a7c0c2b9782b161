"""The page in a real browser: it fits a phone, renews itself, and complains of nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.service.browser import browser
from tests.service.support import Running
from tests.service.test_quotas import saved, step

pytestmark = pytest.mark.ranks

WIDTHS = {"phone": 390, "desktop": 1280}


def test_the_page_is_live_and_fits(mixed: Running, tmp_path: Path) -> None:
    """Pictures of it are kept in the folder that LOBRA_PICTURES names."""
    operator = mixed.client("looking", is_operator=True)
    client = mixed.client("curve")
    model = client.new_model(client.new_session(), 0, rank=2)
    for seq_id in range(1, 13, 2):
        step(client, model, seq_id)
    saved(client, model, "a.b", seq_id=13)
    pictures = Path(os.environ.get("LOBRA_PICTURES", tmp_path))
    address = f"{mixed.service.address}/"
    with browser() as found:
        for name, width in WIDTHS.items():
            found.open(address, operator.key, width)
            assert found.run("document.documentElement.scrollWidth") <= width
            assert model in found.run("document.body.innerText")
            assert found.run("document.querySelectorAll('polyline').length") >= 2
            pictures.joinpath(f"{name}.png").write_bytes(found.screenshot())
        assert found.run("document.getElementById('stale').hidden") is True
        other = mixed.client("later")
        later = other.new_model(other.new_session(), 0, rank=2)
        found.run(
            "new Promise(done => new MutationObserver(done).observe(document.querySelector('main'),"
            " {childList: true}))"
        )
        assert later in found.run("document.body.innerText")
        link = f"a[href*='{model}'][href$='/weights/a.b/archive']"
        fetched = found.run(
            f'fetch(new URL(document.querySelector("{link}").href, location.origin).href)'
            ".then(answer => answer.arrayBuffer()).then(content => content.byteLength)"
        )
        assert fetched % 512 == 0 and fetched > 2048
        assert found.complaints == []
