"""Which build of PyTorch `make` installs, asked of indexes that a server on this machine plays."""

import os
import sys
import threading
import time
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import install
from install import Choice, InstallError, choose


class Index:
    """A package index: answers with links to wheels, or late."""

    def __init__(self, **versions):
        self.delay = 0.0
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                package = self.path.strip("/").split("/")[-1]
                time.sleep(index.delay)
                wheels = [f"{package}-{version}-py3-none-any.whl" for version in versions.get(package, ())]
                page = "".join(f'<a href="{wheel.replace("+", "%2B")}">{wheel}</a>' for wheel in wheels).encode()
                self.send_response(200 if wheels else 404)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def indexes(monkeypatch):
    """Let pip ask such an index, and another one in the place of PyTorch's own."""
    started = []

    def start(configured, public):
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        started.extend((Index(**configured), Index(**public)))
        monkeypatch.setenv("PIP_INDEX_URL", started[0].url)
        monkeypatch.setattr(install, "PUBLIC", started[1].url)
        monkeypatch.setattr(install, "PATIENCE", 60.0)
        return started

    yield start
    for index in started:
        index.server.shutdown()
        index.server.server_close()


DEFAULT = {"torch": ["2.14.0"], "torchvision": ["0.29.0"]}
CPU = {"torch": ["2.13.0+cpu", "2.14.0+cpu", "3.0.0+cpu"], "torchvision": ["0.28.0+cpu", "0.29.1+cpu", "0.30.0+cpu"]}


def chosen(*wishes):
    """Return the choice for each wish; indexes are asked once."""
    find = cache(install.find_cpu_build)
    return [choose(wish, why_default=str, find=find) for wish in wishes]


def test_without_a_gpu_the_cpu_build_of_pips_own_indexes_comes_first(indexes):
    indexes({"torch": [*DEFAULT["torch"], *CPU["torch"]], "torchvision": CPU["torchvision"]}, CPU)
    (choice,) = chosen("")
    assert choice.words == ["torch==2.14.0+cpu", "torchvision==0.29.1+cpu"]
    assert choice.line == "the CPU build 2.14.0+cpu of pip's indexes, as there is no NVIDIA GPU here"


def test_else_the_cpu_build_comes_from_pytorchs_own_index(indexes):
    _, public = indexes(DEFAULT, CPU)
    whys = ("as there is no NVIDIA GPU here", "as TORCH=cpu says")
    for choice, why in zip(chosen("", "cpu"), whys, strict=True):
        assert choice.words == ["--extra-index-url", public.url, "torch==2.14.0+cpu", "torchvision==0.29.1+cpu"]
        assert choice.line == f"the CPU build 2.14.0+cpu of {public.url}, {why}"


def test_a_cpu_build_without_a_torchvision_of_its_kind_is_no_choice(monkeypatch):
    builds = {"torch": ["2.13.0", "2.14.0"], "torchvision": ["0.28.0"]}
    monkeypatch.setattr(install, "_versions", lambda package, index: builds[package])
    assert install.find_cpu_build(None) == ("2.13.0+cpu", "0.28.0+cpu")
    builds["torchvision"].clear()
    assert install.find_cpu_build(None) is None


def test_if_nobody_gives_a_cpu_build_in_time_the_default_comes_and_the_line_says_so(indexes, monkeypatch):
    _, public = indexes(DEFAULT, CPU)
    public.delay, begin = 120.0, time.monotonic()
    monkeypatch.setattr(install, "PATIENCE", 1.0)
    (choice,) = chosen("")
    assert time.monotonic() - begin < 60
    assert choice.pair is None and choice.words == []
    assert choice.line == (
        "the default build with CUDA, several GB, though there is no NVIDIA GPU here: pip's indexes have no CPU builds "
        f"of torch and torchvision for this Python, and {public.url} gave none within 1 s"
    )
    with pytest.raises(InstallError, match=r"expected a CPU build, found none: pip's indexes .* Try TORCH=PATH"):
        choose("cpu", why_default=str, find=lambda index: None)


def unasked(index):
    raise AssertionError("no index needs to be asked")


def test_by_hand_and_with_a_gpu_no_index_is_asked(tmp_path):
    gpu = "there is an NVIDIA GPU here"
    assert choose("", why_default=lambda: gpu, find=unasked) == Choice(f"the default build: {gpu}")
    assert choose("default", why_default=str, find=unasked) == Choice("the default build, as TORCH=default says")
    for name in (
        "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl",
        "torchvision-0.28.0+cpu-cp311-cp311-linux_x86_64.whl",
    ):
        (tmp_path / name).touch()
        if name.startswith("torch-"):
            with pytest.raises(
                InstallError, match=r"wheels of torch and torchvision .*, found torch 2\.13\.0\+cpu in "
            ):
                choose(str(tmp_path / name), why_default=lambda: gpu, find=unasked)
    for path in (tmp_path, tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl"):
        words = choose(str(path), why_default=lambda: gpu, find=unasked).words
        assert words == ["--find-links", str(tmp_path), "torch==2.13.0+cpu", "torchvision==0.28.0+cpu"]
    with pytest.raises(InstallError, match=r"expected cpu, default, or a folder .*, found neither in cup"):
        choose("cup", why_default=str, find=unasked)


def test_gpus_login_nodes_and_other_systems_keep_the_default_build(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.why_cuda(tmp_path, "Linux") == ""
    assert install.why_cuda(tmp_path, "Darwin") == "on Darwin it contains no CUDA"
    for resources, why in (("(null)", ""), ("gpu:a100:4", "SLURM's nodes have GPUs")):
        (tmp_path / "sinfo").write_text(f"#!/bin/sh\necho '{resources}'\n")
        (tmp_path / "sinfo").chmod(0o755)
        assert install.why_cuda(tmp_path, "Linux") == why
    (tmp_path / "nvidia0").touch()
    assert install.why_cuda(tmp_path, "Linux") == "there is an NVIDIA GPU here"


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What would be run, with a uv that fails and pip's settings."""
    calls = []

    def call(words):
        calls.append(list(map(str, words)))
        return 1 if "uv" in str(words[0]) else 0

    class Done:
        def __init__(self, words):
            self.returncode, self.stdout = call(words), "global.index-url='https://mirror/simple'\n"

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(install.subprocess, "run", lambda words, **_: Done(words))
    monkeypatch.setattr(sys, "argv", ["install.py", "--extra", "dev"])
    return calls


def test_what_is_loaded_is_shown_on_a_terminal(commands, monkeypatch):
    monkeypatch.setenv("TORCH", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert install.main() == 0 and "--quiet" not in commands[0]


def test_uv_installs_if_it_is_there_and_pip_where_uv_fails(commands, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH", "")
    assert install.main() == 0
    assert commands == [[*install.PIP, "install", "--quiet", "-e", ".[dev]"]], "PyTorch is there: nothing is asked"
    (tmp_path / "uv").touch(0o755)
    commands.clear()
    assert install.main() == 0
    assert commands[-2][:3] == [str(tmp_path / "uv"), "pip", "install"] and commands[-2][-2:] == ["-e", ".[dev]"]
    assert commands[-1][:4] == [*install.PIP, "install"]
    assert "uv could not install hpo (above): pip is tried." in capsys.readouterr().out


def test_a_wish_that_cannot_be_met_installs_nothing(commands, monkeypatch, capsys):
    monkeypatch.setenv("TORCH", "nowhere")
    assert install.main() == 1 and commands == []
    assert capsys.readouterr().err.startswith("TORCH=nowhere: expected cpu, default, or a folder with wheels of torch")


def test_uv_gets_pips_settings_under_its_own_names():
    settings = (
        "global.index-url='https://mirror/simple'\n"
        "global.extra-index-url='https://one/simple https://two/simple'\n"
        ":env:.find-links='/wheels'\nglobal.find-links='/wheels'\n:env:.default-timeout='180'\n"
    )
    assert install.uv_environment({"PATH": "/bin", "UV_INDEX": "https://own/simple"}, settings) == {
        "PATH": "/bin",
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_INDEX": "https://own/simple",
        "UV_FIND_LINKS": "/wheels",
    }


def test_the_script_needs_nothing_but_pythons_library():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(install.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
