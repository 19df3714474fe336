"""A model goes to a hub, a small server on this machine that speaks what huggingface_hub says, and comes back."""

import base64
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest
from world import official
from world.convert import store

from blip_jax.cli import main
from blip_jax.convert import read, write

SHA = "0123456789abcdef0123456789abcdef01234567"
ROUND = """
import sys
from blip_jax.cli import main
from blip_jax.convert import hub
status = main.main(["push", sys.argv[1], "me/blip-birds", "--private", "--license=mit"])
print("status", status)
if not status:
    print("back in", hub.folder("me/blip-birds"))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories of the server: name -> {"private": bool, "files": {path: bytes}}."""

    def do_POST(self):
        if self.headers["Authorization"] != "Bearer hf_writer":
            return self.answer({"error": "Invalid username or password."}, 401)
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        address = f"http://127.0.0.1:{server.server_port}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            server.repositories.setdefault(name, {"asked": asked, "files": {}})
            return self.answer({"url": f"{address}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if self.path.endswith("/preupload/main"):
            large = lambda path: "lfs" if path.endswith(".safetensors") else "regular"
            rows = [row["path"] for row in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": large(p), "shouldIgnore": False} for p in rows]})
        if self.path.endswith("/info/lfs/objects/batch"):
            rows = json.loads(body)["objects"]
            up = lambda row: row | {"actions": {"upload": {"href": f"{address}/large/{row['oid']}"}}}
            return self.answer({"transfer": "basic", "objects": [up(row) for row in rows]})
        name = re.fullmatch(r"/api/models/(.+)/commit/main", self.path)[1]
        for row in map(json.loads, body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                server.repositories[name]["files"][value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                server.repositories[name]["files"][value["path"]] = server.large[value["oid"]]
        return self.answer({"success": True, "commitOid": SHA, "commitUrl": f"{address}/{name}/commit/{SHA}"})

    def do_PUT(self):
        self.server.large[self.path.removeprefix("/large/")] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self):
        if found := re.fullmatch(r"/api/models/(.+)/revision/main", self.path):
            files = self.server.repositories[found[1]]["files"]
            rows = [{"rfilename": path} for path in files]
            return self.answer({"id": found[1], "sha": SHA, "siblings": rows})
        if found := re.match(rf"/api/models/(.+)/tree/{SHA}", self.path):
            files = self.server.repositories[found[1]]["files"]
            return self.answer([{"type": "file", "path": p, "size": len(x), "oid": ""} for p, x in files.items()])
        found = re.fullmatch(rf"/(.+)/resolve/{SHA}/(.+)", self.path)
        if not found:
            return self.answer({"error": "not here"}, 404)
        name, path = found.groups()
        content = self.server.repositories[name]["files"][path]
        self.answer(content, headers={"ETag": f'"{hash(path):x}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def answer(self, content, status=200, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """The server, and (what a process is told, arguments) -> that process, done."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.large = {}, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def run(*argv, **more):
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_DISABLE_XET": "1",  # the server knows the older way alone
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_writer",
            **more,
        }
        return subprocess.run(
            [sys.executable, "-c", ROUND, *map(str, argv)], env=environment, capture_output=True, text=True, timeout=120
        )

    yield server, run
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    """A captioner as transformers has it, and its vocabulary."""
    vocab = official.vocabulary(tmp_path / "words.txt")
    arrays = official.tensors("caption", official.TINY, img_size=32)
    write.convert(store(tmp_path, "caption", arrays), tmp_path / "hf", to="hf", vocab=vocab, **official.TINY_HEADS)
    return tmp_path / "hf"


@pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('huggingface_hub')",
    reason="huggingface_hub is not installed; pip install -e '.[hub]'",
)
class TestHub:
    def test_a_folder_goes_up_with_a_card_and_comes_back(self, hub, folder):
        server, run = hub
        (folder / "notes.pkl").write_bytes(b"never sent")
        done = run(folder)
        assert done.stdout.count("status 0") == 1, done.stdout + done.stderr
        made = server.repositories["me/blip-birds"]
        assert made["asked"]["visibility" if "visibility" in made["asked"] else "private"] in ("private", True)
        assert {*made["files"]} == {file.name for file in folder.iterdir()} - {"notes.pkl"} | {"README.md"}
        card = made["files"].pop("README.md").decode()
        facts = card.split("---")[1]
        assert "license: mit" in facts and "pipeline_tag: image-to-text" in facts and "library_name" in facts
        assert 'blip_jax.from_pretrained("me/blip-birds")' in card and "BlipForConditionalGeneration" in card
        back = pathlib.Path(re.search("back in (.*)", done.stdout)[1])
        for name, content in made["files"].items():
            assert (folder / name).read_bytes() == content == (back / name).read_bytes()

    def test_who_may_not_write_reads_a_line(self, hub, folder):
        server, run = hub
        done = run(folder, HF_TOKEN="hf_reader")
        assert "status 2" in done.stdout and server.repositories == {}
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: me/blip-birds: the Hugging Face hub did not take it (") and "HF_TOKEN" in last

    def test_a_workdir_is_converted_and_its_card_says_how_it_came_to_be(self, folder, tmp_path, capsys):
        write.convert(folder, tmp_path / "birds")
        settings = json.loads(read.read(tmp_path / "birds").cfg.to_json())
        settings["data"]["train"]["photos"] = {"kind": "json", "path": "/home/somebody/secret.json"}
        settings["train"]["init_from"] = "/home/somebody/pretrained"
        (tmp_path / "birds" / "config.json").write_text(json.dumps(settings))
        (tmp_path / "birds" / "evaluation.json").write_text('{"checkpoint": "0", "CIDEr": 1.25, "pictures": 500}')
        assert main.main(["push", str(tmp_path / "birds"), "me/birds", "--dry_run"]) == 0
        said = capsys.readouterr().out
        assert "model.safetensors" in said and "would send 6 files" in said
        assert "data: photos (json)" in said and "started from pretrained" in said and "somebody" not in said
        assert "| CIDEr | 1.25 |" in said and "| pictures | 500 |" in said and "license" not in said

    def test_a_card_of_ones_own_is_sent(self, folder, tmp_path, capsys):
        (folder / "README.md").write_text("# of the folder")
        (tmp_path / "mine.md").write_text("# mine")
        for more, text in ([], "# of the folder"), ([f"--card={tmp_path / 'mine.md'}"], "# mine"):
            assert main.main(["push", str(folder), "me/birds", "--dry_run", *more]) == 0
            assert capsys.readouterr().out.endswith(f"\n\n{text}\n")
        assert main.main(["push", str(folder), "me/birds", "--dry_run", "--card=none.md"]) == 2
        assert "--card=none.md cannot be read as text" in capsys.readouterr().err

    def test_pickled_weights_stay_here(self, folder, capsys):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert main.main(["push", str(folder), "me/birds", "--dry_run"]) == 2
        assert "pickled weights are not sent" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, said",
    [
        (["model"], "needs MODEL and NAME"),
        (["model", "birds"], "'birds' is no name on the Hugging Face hub: give owner/name"),
        (["model", "me/../birds"], "is no name on the Hugging Face hub"),
    ],
)
def test_what_is_no_repository_is_said(argv, said, capsys):
    assert main.main(["push", *argv]) == 2
    assert said in capsys.readouterr().err
