"""Keys: random, kept as hashes, gone when they are revoked; the commands that do so."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from lobra.cli import main
from lobra.service.ledger import Ledger
from lobra.service.state_folder import LEDGER_FILE
from lobra.service.tables import SERVER, RequestRow, requests
from lobra.service.tenants import all_tenants, tenant_of


def test_keys_come_and_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state-dir", str(tmp_path)]
    keys = {}
    for name in ("alice", "bob"):
        quotas = ("--tokens-per-minute", "9", "--stored-bytes", "8", "--slots", "7")
        assert main(["keys", "add", name, *state, *quotas]) == 0
        keys[name] = capsys.readouterr().out.strip()
    assert all(key.startswith("tml-") and len(key) > 40 for key in keys.values())
    assert keys["alice"] != keys["bob"]
    ledger = Ledger(tmp_path)
    for name, key in keys.items():
        tenant = tenant_of(ledger, key)
        assert tenant is not None
        assert (tenant.name, tenant.tokens_per_minute) == (name, 9)
        assert (tenant.stored_bytes, tenant.slots, tenant.keep_days) == (8, 7, None)
    content = b"".join(path.read_bytes() for path in tmp_path.glob(f"{LEDGER_FILE}*"))
    assert not any(key.encode() in content for key in keys.values())
    assert main(["keys", "revoke", "alice", *state]) == 0
    assert tenant_of(ledger, keys["alice"]) is None
    assert [tenant.name for tenant in all_tenants(ledger)] == ["bob"]
    assert main(["keys", "list", *state]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("bob ") and "0 of 8 bytes stored" in shown and "7 slots" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "bob"], "there is one already"),
        (["add", "a b"], "want letters"),
        (["add", "eve", "--max-models", "0", "--slots", "0"], "2 problems"),
        (["revoke", "eve"], "none of that name"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    state = ["--state-dir", str(tmp_path)]
    assert main(["keys", "add", "bob", *state]) == 0
    assert main(["keys", *words, *state]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_service_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "list", "--state-dir", str(tmp_path / "none")]) == 2
    assert "no service" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_ledger_without_a_later_column_gets_it(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as connection:
        connection.execute("ALTER TABLE requests DROP COLUMN category")
        connection.execute("DROP INDEX requests_by_end")
    row = RequestRow("a", "alice", "m", 1, "optim_step", b"", 0.0)
    for _ in range(2):
        ledger = Ledger(tmp_path)
        ledger.insert(requests, vars(row))
        ledger.finish("a", None, "no room", category=SERVER)
        found = ledger.request("a")
        assert found is not None and (found.error, found.category) == ("no room", SERVER)
        ledger.close()


def test_a_ledger_that_cannot_be_used_is_told_with_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["keys", "list", "--state-dir", str(tmp_path)]
    with closing(sqlite3.connect(tmp_path / LEDGER_FILE)) as older:
        older.execute("PRAGMA user_version = 1")
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "is of format 1, this version reads 2" in message
    assert f"the adapters they saved are below {tmp_path}/models, in PEFT's format" in message
    (tmp_path / LEDGER_FILE).write_bytes(b"junk" * 100)
    assert main(words) == 2
    assert "file is not a database); make room for it, or, if it is damaged, restore a backup" in (
        capsys.readouterr().err
    )


def test_a_key_is_not_for_a_folder_of_other_things(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ours").touch()
    assert main(["keys", "add", "a/b", "--state-dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    for part in ("2 problems", "holds other things", "tenant 'a/b': want letters"):
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_damaged_folder_is_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["backup", str(tmp_path / "copy"), "--state-dir", str(tmp_path)]
    (tmp_path / LEDGER_FILE).write_bytes(b"junk" * 1000)
    assert main(words) == 2
    assert "no service has been there" in capsys.readouterr().err
    (tmp_path / "deployment.json").write_text("{}")
    assert main(words) == 2
    assert "cannot be copied (file is not a database)" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
