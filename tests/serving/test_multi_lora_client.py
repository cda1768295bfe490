"""The client of a multi-LoRA server, against a stand-in that speaks the completions API with PEFT's own adapters."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.made_runs import QUICK, base_folder, command, config_file, data_folder
from helpers.places import ROOT
from helpers.waiting import SECONDS
from transformers import PreTrainedTokenizerFast

from loracurve.inference.prediction import predict_split
from loracurve.model.base_model import load_base
from loracurve.runs.run import open_run
from loracurve.serving.multi_lora_client import ServedCurve
from loracurve.system.errors import UserError


class Server(ThreadingHTTPServer):
    """One base model with several adapters. What it is asked is kept; `mood` makes it misbehave."""

    daemon_threads = True

    def __init__(self, model: peft.PeftModel | None = None, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.mood = model, tokenizer, "well"
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.canned: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        self.answered = threading.Event()  # when slow

    @property
    def completions(self) -> list[dict[str, Any]]:
        return [asked for asked in self.asked if "max_tokens" in asked]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @torch.no_grad()
    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["model"] in self.canned:
            return {"choices": [{"index": 0, **self.canned[asked["model"]]}]}
        assert self.model is not None and self.tokenizer is not None
        prompts = [asked["prompt"]] if isinstance(asked["prompt"], str) else asked["prompt"]
        choices = []
        with self.lock:
            self.model.set_adapter(asked["model"])
            for index, prompt in enumerate(prompts):
                ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
                log_probs = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                choices.append({"index": index, **self._choice(ids, log_probs, asked)})
        return {"object": "text_completion", "choices": choices[::-1]}  # the order is the index's

    def _choice(self, ids: list[int], log_probs: torch.Tensor, asked: dict[str, Any]) -> dict[str, Any]:
        assert self.tokenizer is not None
        if asked.get("echo"):
            assert asked["max_tokens"] == 0 and isinstance(asked["prompt"], str), "one by one"
            values = [None, *(float(log_probs[i, x]) for i, x in enumerate(ids[1:]))]
            tokens = [self.tokenizer.decode([x]) for x in ids]
            return {"finish_reason": "length", "logprobs": {"tokens": tokens, "token_logprobs": values}}
        assert asked["max_tokens"] == 1
        best = int(log_probs[-1].argmax())
        top: dict[str, float] = {}
        for x in log_probs[-1].argsort(descending=True)[: asked["logprobs"]].tolist():
            top.setdefault(self.tokenizer.decode([x]), float(log_probs[-1, x]))
        if (chosen := asked.get("logprob_token_ids")) and self.mood != "other tokens":
            assert asked["logprobs"] == len(chosen) and asked["return_tokens_as_token_ids"]
            top = {f"token_id:{x}": float(log_probs[-1, x]) for x in {best, *chosen}}
        ended = "stop" if best == self.tokenizer.eos_token_id else "length"
        return {"finish_reason": ended, "logprobs": {"tokens": [self.tokenizer.decode([best])], "top_logprobs": [top]}}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.keys.append(self.headers["Authorization"])
        mood = self.server.mood
        if mood == "slow":
            self.server.answered.wait()
            self.close_connection = True  # nobody listens any more
            return None
        known = self.server.model is None or asked["model"] in self.server.model.peft_config
        paths = ["/v1/completions", "/tokenize"] if mood != "no tokens" else ["/v1/completions"]
        if self.path not in paths or not known:
            return self._send(404, b'{"error": {"message": "The model does not exist."}}')
        if isinstance(asked["prompt"], list) and len(asked["prompt"]) > 1024:
            return self._send(400, b'{"error": {"message": "prompt list length exceeds the maximum"}}')
        if mood == "broken":
            return self._send(500, b"out\nof memory")
        if mood == "page":
            return self._send(200, b"<html>hello</html>")
        if mood == "hangs up":
            self.close_connection = True
            return None
        if self.path == "/tokenize":
            assert self.server.tokenizer is not None
            return self._send(200, json.dumps({"tokens": self.server.tokenizer(asked["prompt"])["input_ids"]}).encode())
        answer = self.server.answer(asked)
        if mood == "no logprobs":
            answer["choices"][0]["logprobs"] = None
        if mood == "one less":
            answer["choices"].pop()
        return self._send(200, json.dumps(answer).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A fitted run, three of its points as adapters, and the base."""
    root = tmp_path_factory.mktemp("serving")
    base = base_folder(root / "base", "llama")
    config = config_file(root / "label.yaml", base, data_folder(root / "data", "label"), "label")
    command("fit", config, "--out", root / "run", *QUICK)
    command("export", root / "run", "--points=3", "--out", root / "points")
    return root / "run", root / "points", base


@pytest.fixture(scope="module")
def running_server(exported: tuple[Path, Path, Path]) -> Iterator[Server]:
    _, points, base = exported
    model, tokenizer = load_base(str(base))
    folders = sorted(p for p in points.iterdir() if p.is_dir())
    served = peft.PeftModel.from_pretrained(model, str(folders[0]), folders[0].name)
    for folder in folders[1:]:
        served.load_adapter(str(folder), folder.name)
    yield from running(Server(served.eval(), tokenizer))  # type: ignore[arg-type]


@pytest.fixture
def server(running_server: Server) -> Server:
    running_server.mood, running_server.asked, running_server.keys = "well", [], []
    return running_server


@pytest.fixture
def canned() -> Iterator[Server]:
    yield from running(Server())


def index_file(folder: Path, weights: dict[str, float]) -> Path:
    path = folder / "index.json"
    path.write_text(json.dumps([{"folder": n, "t": 0.5, "weight": w} for n, w in weights.items()]))
    return path


def test_probabilities_of_answers_equal_the_librarys_own(exported: tuple[Path, Path, Path], server: Server) -> None:
    run = open_run(exported[0])
    rows = run.task.dataset.rows("test")[:4]
    encoded = run.task.encode_rows(rows, "rows", labelled=False)
    average = run.average()
    expected = predict_split(run.model, encoded, average.t, average.weights)
    client = ServedCurve(server.url + "/", exported[1], api_key="k")
    prompts = [f"Text: {row.text}\nLabel:" for row in rows]
    found = client.choices(prompts, [" negative", " positive"])
    assert torch.allclose(found.point_probs, expected.point_probs, atol=1e-5)
    for name in ("probs", "entropy", "expected_entropy", "mutual_information"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5), name
    assert float(found.mutual_information.max()) > 1e-4, "the points differ, or nothing was tested"
    # Each answer is one token: one request for each point, whatever the number of prompts and answers.
    assert sorted(asked["model"] for asked in server.completions) == ["point-00", "point-01", "point-02"]
    assert all(len(asked["prompt"]) == 4 for asked in server.completions) and set(server.keys) == {"Bearer k"}
    # A server that tells no tokens echoes each text with its answer.
    server.mood, server.asked = "no tokens", []
    torch.testing.assert_close(
        client.choices(prompts, [" negative", " positive"]).probs, found.probs, atol=1e-5, rtol=0
    )
    echoed = [asked["prompt"] for asked in server.completions]
    assert echoed == [prompt + answer for prompt in prompts for answer in (" negative", " positive")] * 3


def test_unknowns_of_a_server_are_refused_where_they_are_asked_for(
    exported: tuple[Path, Path, Path], server: Server
) -> None:
    """The folder has them, and is served all the same; the server gives nothing to read them from."""
    assert (exported[1] / "unknowns.json").is_file()
    client = ServedCurve(server.url, exported[1])
    assert client.choices("Text: a plain story\nLabel:", [" negative", " positive"]).within_points.tolist() == [0]
    asked = len(server.asked)
    with pytest.raises(
        UserError, match="expected a model whose hidden states can be read, found a completions API"
    ) as e:
        client.choices("Text: a plain story\nLabel:", [" negative", " positive"], unknowns=True)
    assert "\n" not in str(e.value) and len(server.asked) == asked, "nothing is sent for it"


def test_answers_of_several_tokens_that_share_their_beginning(
    exported: tuple[Path, Path, Path], server: Server
) -> None:
    run = open_run(exported[0])
    answers = [" yes he she", " yes he", " yes they who what", " one"]
    found = ServedCurve(server.url, exported[1]).choices("Text: fire\nLabel:", answers)
    expected = []
    with torch.no_grad():
        for t in run.average().t.tolist():
            scores = []
            for answer in answers:
                ids = run.task.tokenizer("Text: fire\nLabel:" + answer)["input_ids"]
                log_probs = run.model(t, input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                scores.append(sum(float(log_probs[i, x]) for i, x in enumerate(ids[1:])))
            expected.append(torch.tensor(scores).softmax(0))
    assert torch.allclose(found.point_probs[:, 0].double(), torch.stack(expected).double(), atol=1e-5)


def test_text_is_generated_from_the_average_of_the_points(exported: tuple[Path, Path, Path], server: Server) -> None:
    run = open_run(exported[0])
    tokenizer, average = run.task.tokenizer, run.average()
    client = ServedCurve(server.url, exported[1], top=len(tokenizer))
    prompt = "The sentiment of the word"
    found = client.generate(prompt, max_new_tokens=4)
    text = prompt
    for step in found.steps:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            probs = run.model(average.t, input_ids=ids).logits[:, -1].double().softmax(-1)
        mixture = average.weights @ probs
        best = int(mixture.argmax())
        assert step.tokens[0] == tokenizer.decode([best])
        assert step.probs[0] == pytest.approx(float(mixture[best]), abs=1e-6)
        assert sum(step.probs) + step.rest == pytest.approx(1)
        # Bytes that decode alike are merged, so that the entropy is a lower bound.
        whole = float(torch.special.entr(mixture).sum())
        assert whole / 2 < step.entropy <= whole + 1e-6
        assert step.entropy == pytest.approx(step.expected_entropy + step.mutual_information)
        text += step.tokens[0]
    assert text == prompt + found.text or found.finish == "eos"


def test_tokens_that_not_all_points_list_are_one_class(canned: Server, tmp_path: Path) -> None:
    lists = {"a": {"x": 0.5, "y": 0.25, "z": 0.125}, "b": {"y": 0.5, "x": 0.25, "w": 0.25}}
    for name, probs in lists.items():
        top = {token: float(torch.tensor(p).log()) for token, p in probs.items()}
        canned.canned[name] = {"finish_reason": "stop", "logprobs": {"tokens": [max(probs)], "top_logprobs": [top]}}
        canned.canned[name]["logprobs"]["tokens"] = ["x" if name == "a" else "y"]
    client = ServedCurve(canned.url, index_file(tmp_path, {"a": 0.25, "b": 0.75}))
    step = client.next_token("p")
    assert (
        step.tokens == ("y", "x") and step.probs == pytest.approx((0.4375, 0.3125)) and step.rest == pytest.approx(0.25)
    )
    assert step.certain and step.ends
    coarse = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], dtype=torch.float64)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert step.entropy == pytest.approx(float(torch.special.entr(weights @ coarse).sum()))
    assert step.expected_entropy == pytest.approx(float(weights @ torch.special.entr(coarse).sum(-1)))
    text = client.generate("p", 5)
    assert text.text == "" and text.finish == "eos" and len(text.steps) == 1
    for answer in canned.canned.values():
        answer["finish_reason"] = "length"
    assert client.generate("p", 2).text == "yy" and client.generate("p", 2, stop=["y"]).finish == "eos"
    canned.canned["b"]["logprobs"]["top_logprobs"] = [{"w": -0.1}]
    with pytest.raises(UserError, match="none of their 20 most probable tokens in common; raise top"):
        client.next_token("p")


@pytest.mark.parametrize(
    ("mood", "message"),
    [
        ("broken", "refuses 'point-0.' with status 500: out of memory"),
        ("page", "expected JSON, found something else; is it a completions API"),
        ("hangs up", "expected a server, found none"),
        ("slow", "expected an answer within 0.3 s, found none"),
        ("no logprobs", "found something else; does it give logprobs"),
        ("other tokens", "expected top_logprobs of the tokens in logprob_token_ids from a point, found something else"),
        ("one less", "expected 1 choices instead of 0 from point-0."),
    ],
)
def test_a_server_that_misbehaves_is_told_in_one_line(
    mood: str, message: str, exported: tuple[Path, Path, Path], server: Server
) -> None:
    server.mood = mood
    server.answered.clear()
    client = ServedCurve(server.url, exported[1], timeout=0.3 if mood == "slow" else SECONDS)  # it never answers
    try:
        with pytest.raises(UserError, match=message) as said:
            client.choices("Text: a\nLabel:", [" negative", " positive"])
    finally:
        server.answered.set()
    assert "\n" not in str(said.value)
    if mood in ("no logprobs", "broken"):
        with pytest.raises(UserError, match="logprobs|status 500"):
            client.next_token("a")


def test_what_is_wrong_before_anything_is_asked(
    exported: tuple[Path, Path, Path], server: Server, tmp_path: Path
) -> None:
    unknown = ServedCurve(server.url, index_file(tmp_path, {"other": 1.0}))
    with pytest.raises(UserError, match="refuses 'other' with status 404: .*; does it serve the adapter 'other'"):
        unknown.next_token("a")
    with pytest.raises(UserError, match="url: expected one that begins with http"):
        ServedCurve("file:///etc", exported[1])
    with pytest.raises(UserError, match="index.json: expected a file, found none"):
        ServedCurve(server.url, exported[0])
    with pytest.raises(UserError, match="weights >= 0 with sum 1"):
        ServedCurve(server.url, index_file(tmp_path, {"a": 0.5, "b": 0.4}))
    (tmp_path / "index.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="expected a list of folder, t and weight"):
        ServedCurve(server.url, tmp_path)
    with pytest.raises(UserError, match="at least two different answers"):
        ServedCurve(server.url, exported[1]).choices("a", [" one", " one"])
    with socket.socket() as silent, pytest.raises(UserError, match="expected a server, found none"):
        silent.bind(("127.0.0.1", 0))  # and does not listen
        ServedCurve(f"http://127.0.0.1:{silent.getsockname()[1]}", exported[1], timeout=SECONDS).next_token("a")


def test_many_prompts_are_several_requests(
    exported: tuple[Path, Path, Path], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, texts = ServedCurve(server.url, exported[1]), [f"Text: a story of {i} parts\nLabel:" for i in range(5)]
    whole = client.choices(texts, [" no", " yes", " negative"]).probs
    assert [len(asked["prompt"]) for asked in server.completions] == [5] * 3
    server.asked = []
    monkeypatch.setattr("loracurve.serving.multi_lora_client._MOST_PROMPTS", 2)
    torch.testing.assert_close(client.choices(texts, [" no", " yes", " negative"]).probs, whole, atol=1e-9, rtol=0)
    assert [len(asked["prompt"]) for asked in server.completions] == [2] * 6 + [1] * 3
    # More answers than tokens that a server lists.
    monkeypatch.setattr("loracurve.serving.multi_lora_client._MOST_TOKENS", 2)
    torch.testing.assert_close(client.choices(texts, [" no", " yes", " negative"]).probs, whole, atol=1e-5, rtol=0)


def test_tokens_that_are_named_by_number_are_refused(canned: Server, tmp_path: Path) -> None:
    listed = {"tokens": ["token_id:7"], "top_logprobs": [{"token_id:7": -0.1, "token_id:9": -3.0}]}
    canned.canned = {"a": {"finish_reason": "length", "logprobs": listed}}
    client = ServedCurve(canned.url, index_file(tmp_path, {"a": 1.0}))
    assert client.next_token("x").tokens == ("token_id:7", "token_id:9")
    with pytest.raises(UserError, match="expected tokens as text, found 'token_id:7'; .*return-tokens-as-token-ids"):
        client.generate("x", 2)


def test_the_example_of_the_page_runs(
    exported: tuple[Path, Path, Path], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported[1].parent)
    text = (ROOT / "docs" / "serving.md").read_text()
    block = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(block.replace("http://127.0.0.1:8000", server.url), names)
    assert names["predictive"].probs.shape == (1, 2)
