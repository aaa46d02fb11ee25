"""A server that gold starts: the command, its log, and that it ends with the run however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny_models as tiny
from support.vllm_server import VLLMServer, engine_on

import gold.run
from gold import Config, ConfigError, EngineError
from gold.activity import Activity, Stopped, listening, stoppable
from gold.build import rollout_engine
from gold.diagnose import diagnose_run
from gold.rollout.vllm_process import ColocatedEngine, ServerCommand

FAKE = """
import http.server, json, os, subprocess, sys, time
import importlib.util
print("server", os.getpid(), flush=True)
print("words", *sys.argv[1:], flush=True)
print("extension", importlib.util.find_spec("gold_vllm_extension") is not None, flush=True)
print("dev mode", os.environ["VLLM_SERVER_DEV_MODE"], flush=True)
if "--refuse" in sys.argv:
    raise ValueError("no such model\\\\nanywhere")
if "--slow" in sys.argv:
    time.sleep(60)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # as vLLM's own engine
print("child", child.pid, flush=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        data = json.dumps({"data": [{"id": "student", "max_model_len": 77}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that is called vllm and answers one request."""
    package = tmp_path / "packages" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return tmp_path / "vllm.log"


def pid_of(what: str, log: Path) -> int:
    """Of the server, or of its child."""
    return next(int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith(what))


def within_seconds(happens: Callable[[], bool]) -> bool:
    return any(happens() or time.sleep(0.05) for _ in range(200))


def ends(pid: int) -> bool:
    def ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (ProcessLookupError, FileNotFoundError):
            return True

    return within_seconds(ended)


def test_a_server_is_started_at_its_first_use_and_ended_with_its_children(fake: Path) -> None:
    engine = ColocatedEngine(ServerCommand("models/student", context=77), log=fake)
    assert not fake.exists()
    assert engine.learn_context() == 77
    told = fake.read_text()
    assert "extension True" in told
    assert "dev mode 1" in told
    assert "--model models/student --served-model-name student --host 127.0.0.1 --port" in told
    assert "--max-model-len 77" in told
    assert "--enable-scale-out --logprobs-mode processed_logprobs" in told
    pid = pid_of("child", fake)
    engine.close()
    engine.close()
    assert ends(pid)
    assert not engine.folder.exists()


def test_a_server_ends_where_its_run_is_killed_and_no_weights_stay(fake: Path) -> None:
    code = (
        "import time\n"
        "from gold.rollout.vllm_process import ColocatedEngine, ServerCommand\n"
        f"engine = ColocatedEngine(ServerCommand('m'), log={str(fake)!r})\n"
        "engine.start()\n"
        "assert engine.transfer.folder == engine._folder == engine.folder\n"
        "(engine.folder / 'gold-1.safetensors').write_bytes(b'weights of a push')\n"
        "print(engine.folder, flush=True)\n"
        "time.sleep(60)\n"
    )
    root = str(Path(gold.run.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert run.stdout is not None
    folder = Path(run.stdout.readline().decode().strip())
    assert len(list(folder.iterdir())) == 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert ends(pid_of("child", fake))
    assert within_seconds(lambda: not folder.exists())


def test_a_server_that_cannot_start_is_one_line_with_its_log(fake: Path) -> None:
    engine = ColocatedEngine(ServerCommand("m", arguments=["--refuse"]), log=fake)
    with pytest.raises(
        EngineError, match=r"^vLLM ended with exit code 1: ValueError: no such model.*its log is"
    ) as error:
        engine.push({}, 0)
    assert "\n" not in str(error.value)
    engine.close()


def test_a_run_that_is_interrupted_does_not_wait_until_its_server_has_started(fake: Path) -> None:
    class Interrupted:
        @property
        def stops(self) -> bool:
            return fake.exists() and "server" in fake.read_text()

        def hear(self, activity: Activity) -> None:
            assert activity.path == ("starting vLLM",)

    engine = ColocatedEngine(ServerCommand("m", arguments=["--slow"]), log=fake, start_s=30.0)
    with listening(Interrupted()), stoppable(), pytest.raises(Stopped):
        engine.start()
    engine.close()
    assert ends(pid_of("server", fake))


def test_a_server_that_dies_is_told_apart_from_one_that_cannot_be_reached(fake: Path) -> None:
    engine = ColocatedEngine(ServerCommand("m"), retries=0)
    engine.start()
    fake = engine.log
    assert engine.process is not None
    os.kill(pid_of("server", fake), signal.SIGKILL)
    engine.process.wait()
    with pytest.raises(EngineError, match="vLLM ended with exit code"):
        engine.push({}, 0)
    assert ends(pid_of("child", fake))
    engine.close()
    assert fake.exists()  # its log is named by the error
    fake.unlink()


# Configurations


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny.save_pair(folder)
    return folder


def configured(folder: Path, output: Path, engine: object, **changes: object) -> dict:
    return tiny.run_settings(folder, output, rollout__engine=engine, **changes)


def test_the_ways_to_write_an_engine(folder: Path, tmp_path: Path) -> None:
    def engine(given: object) -> object:
        config = Config.model_validate(configured(folder, tmp_path, given))
        assert Config.model_validate(config.to_dict()) == config
        assert config.recipe == Config.model_validate(tiny.run_settings(folder, tmp_path)).recipe
        return config.rollout.engine.vllm

    assert engine("hf") is None
    started, there = engine({"vllm": "colocated"}), engine({"vllm": {"url": "http://localhost:8000"}})
    assert started.url is None
    assert there.url == "http://localhost:8000"
    assert engine({"vllm": {"python": "/opt/vllm/bin/python"}}).python == "/opt/vllm/bin/python"


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        ("vlm", 'rollout.engine: expected hf or {vllm: …}, got "vlm"'),
        ({"vllm": "here"}, 'rollout.engine.vllm: expected colocated, or keys such as url, got "here"'),
        (
            {"vllm": {"url": "localhost"}},
            "rollout.engine.vllm.url: expected one such as http://localhost:8000/v1",
        ),
        (
            {"vllm": {"url": "http://a", "python": "p"}},
            "rollout.engine.vllm: python is of a server that gold starts",
        ),
        (
            {"vllm": {"transfer": "nccl"}},
            "rollout.engine.vllm: transfer nccl is for a server with GPUs of its own",
        ),
        (
            {"vllm": {"url": "http://a", "transfer": "tcp"}},
            "rollout.engine.vllm.transfer: expected file | nccl | ipc",
        ),
        ({"vllm": {"urls": "x"}}, "rollout.engine.vllm.urls: unknown key; did you mean url?"),
        ({"vllm": {"url": "http://a", "key_env": "sk-123"}}, "expected the name of an environment variable"),
    ],
)
def test_an_engine_that_cannot_be_is_one_line_with_its_key(
    folder: Path, tmp_path: Path, engine: object, line: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Config.model_validate(configured(folder, tmp_path, engine))
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert "sk-123" not in str(error.value)


def test_a_configured_run_draws_from_its_server_and_so_do_its_evaluation_and_the_doctor(
    folder: Path, tmp_path: Path
) -> None:
    with VLLMServer(tiny.tiny_student(), context=128) as server:
        settings = configured(folder, tmp_path / "run", {"vllm": {"url": server.url}}, train__steps=2)
        run = gold.run.train(Config.model_validate(settings))
        assert len(run.steps) == 2
        assert not server.violations
        drawn, pushed = server.counts["/inference/v1/generate"], server.counts["/update_weights"]
        assert pushed == 3 + 2
        found = gold.run.evaluate_source(tmp_path / "run")
        assert server.counts["/inference/v1/generate"] > drawn
        assert found.measures["stop_rate"] == run.evaluations[-1]["stop_rate"]
        file = tiny.write_settings(tmp_path / "run.yaml", settings)
        assert [c.status for c in diagnose_run(file).checks if c.check == "rollout engine"] == ["pass"]
        server.context = 8
        checks = [c for c in diagnose_run(file).checks if c.check == "rollout engine"]
        assert "do not fit its 8 tokens; start it with --max-model-len" in checks[0].found
        server.context = 128
        server.flaws.add("stale head")
        checks = [c for c in diagnose_run(file).checks if c.check == "rollout engine"]
        assert "output matrix" in checks[0].found
        # Another server may go on with a run.
        moved = configured(folder, tmp_path / "run", {"vllm": {"url": "http://127.0.0.1:9"}}, train__steps=2)
        gold.run.check_output(
            gold.run.Saving(tmp_path / "run", resume=True), Config.model_validate(moved).to_dict(), {}
        )


def test_a_server_for_several_processes_is_not_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate(configured(folder, tmp_path, {"vllm": "colocated"}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="serves one process"), rollout_engine(config, config.student):
        pass


def test_an_engine_of_python_is_public() -> None:
    with VLLMServer(tiny.tiny_student()) as server:
        assert isinstance(engine_on(server), gold.VLLMEngine)
