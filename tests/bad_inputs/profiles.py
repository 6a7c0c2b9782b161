"""Profiles and their sidecars, and files of sequence lengths."""

from __future__ import annotations

import json

from tests.bad_inputs.case import Case

TIME = "exp_result/profile/cost_model/profile_time_base.csv"
MEMORY = "exp_result/profile/memory/max_tokens_base_2tasks.csv"
LINKS = "exp_result/profile/cost_model/profile_collectives_base.csv"
HEAD = "exp_result/profile/cost_model/profile_head_base.csv"
_TIME, _MEMORY = "tp,seq_len,mbs,time\n", "tp,pp,sp,max_tokens\n"

TIMES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "column tp, seq_len, mbs, time is missing"),
    "header-only": (_TIME, "has no rows; make the profile with"),
    "no-time": ("tp,seq_len,mbs\n1,2,3\n", "column time is missing"),
    "word": (f"{_TIME}1,64,1,fast\n", "line 2: time: 'fast' is not a number"),
    "nan": (f"{_TIME}1,64,1,nan\n", "line 2: time: nan is not finite"),
    "infinite": (f"{_TIME}1,64,1,inf\n", "measure the row again"),
    "negative": (f"{_TIME}1,64,1,-3\n", "a time is positive"),
    "aeons": (f"{_TIME}1,64,1,1e300\n", "measure the row again"),
    "fraction": (f"{_TIME}1,64.5,1,3\n", "line 2: seq_len: '64.5' is not a whole number"),
    "no-tp": (f"{_TIME}0,64,1,3\n", "line 2: tp: must be at least 1"),
    "long-number": (f"{_TIME}1,{'9' * 5000},1,3\n", "line 2: seq_len"),
    "cut": (f"{_TIME}1,64\n", "line 2: mbs"),
    "policy": ("tp,seq_len,mbs,time,memory\n1,64,1,3,all\n", "line 2: memory"),
    "latin": (b"tp,seq_len,mbs,time\n\xe9,1,1,1\n", "not UTF-8 text"),
    "utf-16": ("tp,seq_len\n".encode("utf-16"), "not UTF-8 text"),
    "one-row": (f"{_TIME}1,64,1,3\n", "want at least two numbers of tokens"),
    "one-shape": (f"{_TIME}1,64,1,3\n1,64,1,4\n", "want at least two numbers of tokens"),
    "contradiction": (f"{_TIME}1,64,1,3\n1,64,1,300\n1,128,1,5\n", "measure them again"),
    "downhill": (f"{_TIME}1,64,1,300\n1,4096,1,3\n", "measure them again"),
    "wide-cell": (f"{_TIME}1,64,1,{'x' * 200_000}\n", "field larger than field limit"),
    "rows": (_TIME + "1,64,1,3\n" * 6000, "has 6000 rows, want at most"),
    "other-tp": (f"{_TIME}8,64,1,3\n8,128,1,5\n", "tp 1"),
}
MEMORIES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is missing"),
    "header-only": (_MEMORY, "has no rows"),
    "word": (f"{_MEMORY}1,1,1,many\n", "line 2: max_tokens: 'many' is not a whole number"),
    "negative": (f"{_MEMORY}1,1,1,-5\n", "line 2"),
    "no-tp": (f"{_MEMORY}0,1,1,5\n", "line 2: tp and pp are at least 1"),
    "twice": (f"{_MEMORY}1,1,1,256\n1,1,1,512\n", "is already on line 2; keep one"),
    "endless": (f"{_MEMORY}1,1,1,1e11\n", "max_tokens: 100000000000, want at most"),
    "gpus": (f"{_MEMORY}99999,99,1,256\n", "GPUs, want at most"),
    "not-monotone": (f"{_MEMORY}1,1,1,8192\n2,1,1,256\n", "not monotone"),
    "policy": ("tp,pp,sp,max_tokens,memory\n1,1,1,256,all\n", "line 2: memory"),
}
LINK_ROWS: dict[str, tuple[str, str]] = {
    "kind": ("kind,ranks,bytes,time\ngossip,2,1,1\n", "line 2: kind 'gossip'"),
    "one-rank": ("kind,ranks,bytes,time\ntransfer,1,1,1\n", "ranks is at least 2"),
    "nan": ("kind,ranks,bytes,time\ntransfer,2,nan,1\n", "positive and finite"),
    "no-bytes": ("kind,ranks,bytes,time\ntransfer,2,0,1\n", "positive and finite"),
}
SIDECARS: dict[str, tuple[str | bytes, str]] = {
    "list": ("[1]", "want an object"),
    "cut": ("{", "not valid JSON"),
    "settings": ('{"settings": 7}', "settings"),
    "adapters": ('{"settings": {"adapters": [[8]]}}', "settings.adapters"),
    "rows": ('{"rows": [1]}', "rows"),
    "spread": ('{"rows": {"1,64,1": {"spread": -1}}}', "spread"),
    "hardware": ('{"environment": {"hardware": 7}}', "environment.hardware"),
    "latin": (b'{"kind": "\xe9"}', "not UTF-8"),
    "digits": ('{"kind": ' + "1" * 5000 + "}", "an integer of 5000 digits"),
}
LENGTHS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "not valid JSON"),
    "list": ("[1, 2]", "want an object"),
    "no-task": ("{}", "want an object"),
    "word": ('{"everything": ["x"], "few": [1]}', 'everything[0] = "x": want a positive integer'),
    "zero": ('{"everything": [0], "few": [1]}', "everything[0] = 0: want a positive integer"),
    "flag": ('{"everything": [true], "few": [1]}', "want a positive integer"),
    "huge": ('{"everything": [1' + "0" * 30 + '], "few": [1]}', "beyond 64 bits"),
    "endless": ('{"everything": [9000000000000000], "few": [1]}', "want at most"),
    "digits": ('{"everything": [' + "9" * 5000 + "]}", "an integer of 5000 digits"),
    "none": ('{"everything": [], "few": [1]}', "is empty"),
    "other-task": ('{"everything": [1]}', "no lengths"),
    "latin": (b'{"\xe9": [1]}', "not UTF-8"),
    "text": ('{"everything": "many", "few": [1]}', "want a list of lengths"),
    "deep": ('{"everything": ' + "[" * 99 + "1" + "]" * 99 + "}", "nested too deeply"),
}


def _cases() -> dict[str, Case]:
    cases = {}
    profiles = {"time": (TIME, TIMES), "memory": (MEMORY, MEMORIES), "links": (LINKS, LINK_ROWS)}
    for kind, (path, table) in profiles.items():
        for name, (content, says) in table.items():
            command = "train" if name == "other-tp" else "plan"
            cases[f"{kind}-{name}"] = Case(
                (path.rpartition("/")[2], says), {path: content}, command=command
            )
    for kind, path in {"time": TIME, "memory": MEMORY}.items():
        sidecar = path.replace(".csv", ".meta.json")
        for name, (content, says) in SIDECARS.items():
            cases[f"{kind}-sidecar-{name}"] = Case(
                (sidecar, says, "restore it, or remove it with its CSV"),
                {sidecar: content},
                command="plan",
            )
    for name, (content, says) in LENGTHS.items():
        where = "tasks.json" if name == "other-task" else "lengths.json"
        cases[f"lengths-{name}"] = Case((where, says), {"lengths.json": content}, command="plan")
    return cases


CASES = _cases() | {
    "time-pipe": Case((TIME, "no regular file"), {TIME: None}, command="plan"),
    "lengths-pipe": Case(("no lengths at lengths.json",), {"lengths.json": None}, command="plan"),
    "time-nowhere": Case(
        ("none.csv: no such profile",), None, ("--time-profile", "none.csv"), "plan"
    ),
    "time-folder": Case(("base: ", "no regular file"), None, ("--time-profile", "base"), "plan"),
    "time-long-name": Case(("File name too long",), None, ("--time-profile", "x" * 300), "plan"),
    "lengths-pickle": Case(
        ("few.npy",), {"folder/few.npy": b"\x80\x04\x95."}, ("--lengths", "folder"), "plan"
    ),
    "lengths-zip": Case(
        ("few.npy",), {"folder/few.npy": b"PK\x03\x04"}, ("--lengths", "folder"), "plan"
    ),
    "lengths-no-array": Case(
        ("few.npy",), {"folder/few.npy": json.dumps([1])}, ("--lengths", "folder"), "plan"
    ),
    "lengths-cut-array": Case(
        ("few.npy",),
        {
            "folder/few.npy": b"\x93NUMPY\x01\x00\x46\x00{'descr': '<i8', 'fortran_order': False, "
            b"'shape': (1000000000000,), }" + b" " * 8 + b"\n"
        },
        ("--lengths", "folder"),
        "plan",
    ),
    "lengths-empty-folder": Case(
        ("no .npy file",), {"folder/x.txt": ""}, ("--lengths", "folder"), "plan"
    ),
}
