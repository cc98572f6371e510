"""Examples for sites, and the two recipes of containers: what can be checked without such a network or a registry."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from helpers import ROOT

EXAMPLES = [ROOT / "slurm/site.example.sh", *sorted((ROOT / "slurm/sites").glob("*.example.sh"))]
SETTING = re.compile(r"(?:# ?)?(?:export )?([A-Z][A-Z0-9_]*)=")
DOCKERFILE, DEFINITION = (ROOT / "slurm/containers" / name for name in ("Dockerfile", "hola.def"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_a_site_file_is_read_without_a_word(example, tmp_path):
    """With every setting that is commented out, too."""
    whole = tmp_path / "site.sh"
    whole.write_text(re.sub(r"^# ((?:export )?[A-Z][A-Z0-9_]*=)", r"\1", example.read_text(), flags=re.M))
    for site in (example, whole):
        done = subprocess.run(["bash", "slurm/on_node.sh", "env"], cwd=ROOT, capture_output=True, text=True,
                              check=False, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "USER": "me",
                                                "HOLA_SITE": str(site)})
        assert done.returncode == 0 and done.stderr == "", done.stderr
    exported = re.findall(r"^(?:# )?export (\w+)=", example.read_text(), flags=re.M)
    assert exported and [name for name in exported if f"\n{name}=" not in f"\n{done.stdout}"] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_setting_says_what_it_is_for(example):
    """In the line above it, or in one above settings that stand together."""
    said = False
    for number, line in enumerate(example.read_text().splitlines(), 1):
        setting = SETTING.match(line)
        assert said or not setting, f"{example.name}:{number}: {line}"
        said = said and line != "" if setting else line.startswith("#") or (said and line != "")


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scripts_are_without_findings_of_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", "-P", str(ROOT), *map(str, sorted((ROOT / "slurm").rglob("*.sh")))],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def instructions(text: str) -> list[str]:
    """Of a Dockerfile: one line each, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [" ".join(line.split()) for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines() if line.strip()]


def sections(text: str) -> dict[str, str]:
    """Of an Apptainer definition: {name: text}, the head as ""."""
    parts = re.split(r"^%(\w+)\n", text, flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_what_the_containers_copy_exists():
    copied = [words[1:-1] for line in instructions(DOCKERFILE.read_text()) if (words := line.split())[0] == "COPY"]
    files = [line.split() for line in sections(DEFINITION.read_text())["files"].strip().splitlines()]
    names = [name for words in copied for name in words]
    assert sorted(names) == sorted(source for source, _ in files)
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert [target for source, target in files if target != f"/opt/source/{source}"] == []


def test_both_containers_are_made_the_same_way():
    """The same base, packages and commands, and extras that exist."""
    docker, apptainer = instructions(DOCKERFILE.read_text()), sections(DEFINITION.read_text())
    defaults = dict(line.removeprefix("ARG ").split("=", 1) for line in docker if line.startswith("ARG"))
    arguments = dict(line.strip().split("=", 1) for line in apptainer["arguments"].strip().splitlines())
    assert {name.lower(): value for name, value in defaults.items()} == arguments
    known = set(re.findall(r'^    "(\w+)": ', (ROOT / "setup.py").read_text(), flags=re.M))
    assert set(arguments["extras"].split(",")) <= known
    run = " ".join(line.removeprefix("RUN ") for line in docker if line.startswith("RUN"))
    assert made_by(run) == made_by(apptainer["post"]) and len(made_by(run)[1]) == 3
    done = subprocess.run(["bash", "-n"], input=apptainer["post"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def made_by(script: str) -> tuple[list[str], list[str]]:
    """(Debian packages, pip's command lines) of a shell script."""
    text = re.sub(r"\\\n|^\s*#.*$", " ", script, flags=re.M)
    for name in ("extras", "transformer_engine"):
        text = text.replace(f"{{{{ {name} }}}}", f"${{{name.upper()}}}")
    packages = re.search(r"--no-install-recommends([\w .-]+?)(?:&&|\n|$)", text)[1].split()
    return packages, [" ".join(line.split()) for line in re.findall(r"\bpip [^&;\n]*", text)]
