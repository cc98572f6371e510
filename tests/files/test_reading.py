"""The readers themselves: any bytes give a value or one line of a `FileProblem`."""

from __future__ import annotations

import os
import sys

import pytest
from pydantic import TypeAdapter

from hola_megatron.files import DamagedFile, FileProblem, MissingFile, UnreadableFile, parse_json, read_bytes, read_json
from hola_megatron.files.schemas import MAPPING
from hola_megatron.files.yaml_text import dump_yaml, parse_yaml

DEEP = 100_000


@pytest.mark.parametrize(("data", "said"), [
    (b"", "empty"), (b" \n", "empty"), (b"{", "not valid JSON"), (b"\xff\xfe{\x00}\x00", "not UTF-8"),
    (b"[" * DEEP, "deep"), (b'{"a":' * DEEP, "deep"), (b"[" * 100 + b"]" * 100, "deep"), (b'{"a": 1, "a": 2}', "twice"),
    (b'{"a": NaN}', "NaN"), (b'{"a": -Infinity}', "Infinity"), (b'{"a": 1e400}', "too large"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"), (b'{"a": "\\ud800"}', "surrogate"),
    (b'{"\\udfff": 1}', "surrogate"), (b"[1]", "dict"), (b"{} {}", "not valid JSON"),
    (b'{"a": "\n"}', "not valid JSON")])
def test_what_is_no_json_is_one_line(data, said):
    with pytest.raises(DamagedFile) as caught:
        parse_json(data, MAPPING)
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_json_is_returned_as_stored():
    data = b'\xef\xbb\xbf{"a": [1, 2.5, null, "\xc3\xa9", true]}'
    assert parse_json(data, MAPPING) == {"a": [1, 2.5, None, "é", True]}


def test_missing_unreadable_and_damaged_are_told_apart(tmp_path):
    """A pipe would block the open, a device gives bytes without end."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "file").write_bytes(b"x" * 100)
    for name, kind in (("none", MissingFile), ("file/none", MissingFile), ("folder", DamagedFile),
                       ("pipe", DamagedFile), ("loop", UnreadableFile), ("zero", DamagedFile),
                       ("x" * 5000, UnreadableFile), ("a\0b", UnreadableFile)):
        with pytest.raises(FileProblem) as caught:
            read_bytes(tmp_path / name)
        assert type(caught.value) is kind and "\n" not in str(caught.value), name
    with pytest.raises(DamagedFile, match="more than 99 bytes"):
        read_bytes(tmp_path / "file", limit=99)
    with pytest.raises(MissingFile):
        read_json(tmp_path / "none", MAPPING)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "secret").chmod(0)
    with pytest.raises(UnreadableFile, match="Permission denied"):
        read_bytes(tmp_path / "secret")


def test_a_schema_says_where(tmp_path):
    (tmp_path / "file").write_text('{"a": {"b": ["x", 2]}}')
    with pytest.raises(DamagedFile, match=r"a\.b\.0: .* found 'x'"):
        read_json(tmp_path / "file", TypeAdapter(dict[str, dict[str, list[int]]]))


@pytest.mark.parametrize(("text", "said"), [
    ("a: {b: 010}", r"line 1: 010 .*at a\.b"), ("a: 1:30", "base 60"), ("a:\n\tb: 1", "indent with spaces"),
    ("a: 1\nb: {c: 1, c: 2}", r"line 2: c is given twice.*at b\.c"), ("a: !!binary abc", "!!binary"),
    ("a: !!int x", "int"), ("a: !!bool maybe", "bool"), ("a: &x [*x]", "inside itself"),
    ("a: &x {<<: *x}", "inside itself"), ("[" * DEEP, "deep"), ("{a: " * 10_000, "deep"), ("- " * DEEP, "deep"),
    ("a: " + "9" * 5000, "too large a number"), ('a: "\\ud800"', "cannot have"), ('a: "\\0"', "cannot have"),
    ("? [1]\n: 2", "a key is a list"), ("a: 1\n---\nb: 2", "another document"), ("x" * 300_000, "more than"),
    ("\x00", "unacceptable character"),
    ("\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30))]),
     "aliases unfolded"),
    ("\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 30))]),
     "aliases unfolded")])
def test_yaml_that_is_refused_in_one_line(text, said):
    with pytest.raises(DamagedFile, match=said) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 1e-3), ("-2E+5", -2e5), ("2024-01-01", "2024-01-01"), ("1_000", 1000), ("0x10", 16), ("yes", True),
    ("null", None), ("~", None), ("08", "08"), ("'010'", "010"), ("'yes'", "yes"), ("\ufeff[1]", [1]), ("", None)])
def test_yaml_values(text, value):
    assert parse_yaml(text) == value


def test_merge_keys_and_aliases_work():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a") == {
        "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


def test_what_is_dumped_is_read_back():
    value = {"names": ["1e-3", "010", "1:30", "yes", "2024-01-01", "null", "", "a: b", "# c", "é\u2028", "1e3"],
             "numbers": [1e-3, 1e300, 3, -0.0], "other": [None, True]}
    assert parse_yaml(dump_yaml(value)) == value


def test_the_readers_need_no_torch():
    code = "import sys, hola_megatron.files.yaml_text, hola_megatron.files.schemas; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
