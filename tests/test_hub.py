"""What comes from the hub, through the libraries' own network code: from a stand-in for it on the loopback."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import Olmo2Config, Olmo2ForCausalLM, Qwen3Config, Qwen3Model

from dynaroute.config.data import ByteBPE
from dynaroute.data.tokens.tokenizers import save_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = {
    "vocab_size": 280, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": 0,
}  # fmt: skip
TEXTS = ["the cat sat on the mat, and the other cat sat on the other mat.\n"] * 5


class Hub:
    """Serves folders as repositories that have one commit; notes what was asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []

    def files(self, repository: str) -> dict[str, Path]:
        folder = self.root / repository
        return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        path, _, query = path.replace("%2F", "/").partition("?")
        missing = 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        if found := re.fullmatch(r"/(?:datasets/)?(\w+/[\w-]+)/resolve/([^/]+)/(.+)", path):
            repository, revision, name = found.groups()
            if revision != COMMIT:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            if name not in self.files(repository):
                return missing
            data = self.files(repository)[name].read_bytes()
            return 200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data
        if found := re.fullmatch(r"/api/(?:datasets|models)/(\w+/[\w-]+)(?:/revision/([^/]+))?", path):
            repository, revision = found.groups()
            if revision not in (None, COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            siblings = [{"rfilename": name} for name in sorted(self.files(repository))]
            info = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "gated": False}
            return 200, {}, json.dumps(info | {"downloads": 0, "likes": 0}).encode()
        if found := re.fullmatch(r"/api/(?:datasets|models)/(\w+/[\w-]+)/tree/([^/]+)(?:/(.*))?", path):
            repository, _, inside = found.groups()
            folder = self.root / repository / (inside or "")
            paths = sorted(folder.rglob("*") if "recursive=true" in query.lower() else folder.glob("*"))
            entries = [self.entry(path.relative_to(self.root / repository).as_posix(), path) for path in paths]
            return (200, {}, json.dumps(entries).encode()) if entries else missing
        if found := re.fullmatch(r"/api/(?:datasets|models)/(\w+/[\w-]+)/paths-info/([^/]+)", path):
            files = self.files(found[1])
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
            return 200, {}, json.dumps([self.entry(name, files[name]) for name in wanted if name in files]).encode()
        return missing

    @staticmethod
    def entry(name: str, path: Path) -> dict:
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
        data = path.read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Hub]]:
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    Olmo2ForCausalLM(Olmo2Config(**SIZES)).bfloat16().save_pretrained(root / "somebody/olmo")
    Qwen3Model(Qwen3Config(**SIZES, head_dim=8)).bfloat16().save_pretrained(root / "somebody/qwen")
    for name, vocab_size in (("olmo", 270), ("qwen", 260)):
        save_tokenizer(ByteBPE(kind="bpe", vocab_size=vocab_size), TEXTS, root / "somebody" / name)
    dataset = root / "somebody/wiki"
    (dataset / "wiki-2").mkdir(parents=True)
    for split, texts in (("train", ["One.", "Two."]), ("validation", ["Three."]), ("test", ["Four."])):
        parquet.write_table(pyarrow.table({"text": texts}), dataset / f"wiki-2/{split}-00000-of-00001.parquet")
    paths = [{"split": split, "path": f"wiki-2/{split}-*"} for split in ("train", "validation", "test")]
    (dataset / "README.md").write_text(
        "---\nconfigs: " + json.dumps([{"config_name": "wiki-2", "data_files": paths}]) + "\n---\n"
    )
    (root / "somebody/texts/urls").mkdir(parents=True)
    (root / "somebody/texts/urls/v1.txt").write_text("http://127.0.0.1/0.gz\nhttp://127.0.0.1/1.gz\n")
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, data = hub.answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_HEAD = do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", hub
    server.shutdown()


def run(code: str, endpoint: str, home: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs code in a process for which the hub is at `endpoint`, and what is cached in `home`."""
    proxies = {"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "HF_TOKEN"}
    environment = {key: value for key, value in os.environ.items() if key not in proxies}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=home, capture_output=True, text=True)


TEXT = f"""
import torch
from dynaroute.config.dagformer import HubEncoder
from dynaroute.config.data import Corpus, Hub
from dynaroute.data.locate import locate
from dynaroute.data.text.sources import documents
at = dict(revision="{COMMIT}")
source = Hub(kind="hub", path="somebody/wiki", name="wiki-2", text_column="text", rows="documents", **at)
locate(source, "")
print([(document.split, document.text) for document in documents(source)])
"""
FETCH = f"""
import contextlib, sys
from huggingface_hub.cli.hf import main
for own in (["somebody/olmo"], ["somebody/qwen"], ["somebody/texts", "urls/v1.txt", "--type", "dataset"]):
    sys.argv[:] = ["hf", "download", *own, "--revision", "{COMMIT}"]
    with contextlib.suppress(SystemExit):
        main()
"""
REST = f"""
from dynaroute.dagformer.encoders import load_encoder
from dynaroute.dagformer.hub import load_model
from dynaroute.data.tokens.stream import list_addresses
from dynaroute.data.tokens.tokenizers import save_tokenizer
own = dict(kind="hub", path="somebody/olmo", **at)
stream = dict(kind="dolma_stream", path="somebody/texts", addresses="urls/v1.txt", files=None, **at)
corpus = Corpus.model_validate(dict(source=stream, split=dict(validation=0.1, test=0.1), tokenizer=own))
locate(corpus.source, "")
print(list_addresses("c", corpus, "raw")["addresses"])
tokenizer = save_tokenizer(corpus.tokenizer, [], "tokenizer")
base = load_model("base", "AutoModelForCausalLM", "somebody/olmo", "cpu", torch.float32, "{COMMIT}")
print(base.config._attn_implementation, base.dtype)
encoder = load_encoder(HubEncoder(kind="hub", path="somebody/qwen", **at), "nowhere", tokenizer, "cpu")
base.save_pretrained("base")
torch.save(encoder.encode_texts(["the cat", "the other mat"]), "vectors.pt")
"""
SAID = [
    "[('train', 'One.'), ('train', 'Two.'), ('validation', 'Three.'), ('test', 'Four.')]",
    "['http://127.0.0.1/0.gz', 'http://127.0.0.1/1.gz']",
    "sdpa torch.float32",
]


def test_models_tokenizers_and_datasets_come_from_the_hub_at_their_revisions(hub, tmp_path):
    endpoint, server = hub
    done = run(TEXT + REST, endpoint, tmp_path)
    assert done.returncode == 0, (server.asked, done.stderr)
    assert done.stdout.splitlines() == SAID
    ours = Olmo2ForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    theirs = Olmo2ForCausalLM.from_pretrained(server.root / "somebody/olmo").state_dict()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in theirs)
    assert torch.load(tmp_path / "vectors.pt", weights_only=True).isfinite().all()
    downloads = [path for path in server.asked if "/resolve/" in path]
    assert len(downloads) > 8
    assert all(f"/resolve/{COMMIT}/" in path for path in downloads)


def test_without_a_network_nothing_is_asked_for_what_was_fetched_before(hub, tmp_path):
    """By the commands of docs/paper-scale.md: `hf download`; and for datasets, `collect`."""
    endpoint, server = hub
    done = run(TEXT + FETCH, endpoint, tmp_path)
    assert done.returncode == 0, (server.asked, done.stderr)
    asked = len(server.asked)
    done = run(TEXT + REST, endpoint, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == SAID
    assert server.asked[asked:] == []


def test_what_the_hub_does_not_have_is_named_in_one_line(hub, tmp_path):
    code = """
from dynaroute.config.data import Hub
from dynaroute.dagformer.hub import load_model
from dynaroute.data.text.sources import documents
from dynaroute.errors import DynarouteError
own = dict(kind="hub", path="somebody/wiki", name="wiki-2", text_column="text", rows="documents", revision="feed")
for load in (
    lambda: load_model("somebody/olmo", "AutoModel", "somebody/olmo", "cpu", "auto", "feed"),
    lambda: load_model("somebody/none", "AutoModel", "somebody/none", "cpu", "auto", "feed"),
    lambda: list(documents(Hub(**own))),
):
    try:
        load()
    except DynarouteError as error:
        print(error)
"""
    lines = run(code, hub[0], tmp_path).stdout.splitlines()
    named = ("somebody/olmo", "somebody/none", "dataset somebody/wiki, wiki-2, feed cannot be loaded")
    for line, problem in zip(lines, named, strict=True):
        assert problem in line
