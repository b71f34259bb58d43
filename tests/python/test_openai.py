"""The official client against a running server, with the real 135M model."""

import json
import threading
import urllib.request

import openai
import pytest

MODEL = "smollm2:135m"


def chat(client, text, **more):
    arguments = {"model": MODEL, "temperature": 0, "max_tokens": 24, **more}
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **arguments)


def test_models_are_listed_loaded_or_not(client):
    names = {model.id for model in client.models.list()}
    assert {MODEL, "tiny", "tiny-sharded"} <= names
    assert client.models.retrieve("tiny").id == "tiny"


def test_an_answer(client):
    answer = chat(client, "What is the capital of France? Answer in one sentence.")
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens > 30  # the template adds a system message
    assert answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same(client):
    whole = chat(client, "Name three colours.")
    text, finish, usage = "", None, None
    stream = chat(client, "Name three colours.", stream=True, stream_options={"include_usage": True})
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert text == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason
    assert usage == whole.usage or usage.completion_tokens == whole.usage.completion_tokens


def test_seeds_repeat_and_differ(client):
    one = chat(client, "Tell me a story.", temperature=1, seed=1)
    assert chat(client, "Tell me a story.", temperature=1, seed=1).choices[0].message == one.choices[0].message
    assert chat(client, "Tell me a story.", temperature=1, seed=2).choices[0].message != one.choices[0].message


def test_choices(client):
    answer = chat(client, "Invent a name.", n=3, temperature=1.2, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_stop_strings_are_not_part_of_the_answer(client):
    whole = chat(client, "Count from one to ten.", max_tokens=40).choices[0].message.content
    stop = whole[6:9]
    cut = chat(client, "Count from one to ten.", max_tokens=40, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == whole[: whole.index(stop)]
    streamed = "".join(
        choice.delta.content or ""
        for event in chat(client, "Count from one to ten.", max_tokens=40, stop=[stop], stream=True)
        for choice in event.choices
    )
    assert streamed == cut.message.content


def test_logprobs(client):
    answer = chat(client, "Say hello.", logprobs=True, top_logprobs=3, max_tokens=5)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens or len(content) == 5
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[-1].logprob
        assert abs(entry.top_logprobs[0].logprob - entry.logprob) < 1e-6  # greedy takes the likeliest


def test_logit_bias(client):
    free = chat(client, "Say hello.", logprobs=True, max_tokens=1).choices[0].logprobs.content[0].token
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0, logit_bias={"28": 100})
    assert free
    assert answer.choices[0].text == ",,,,"


def test_completions(client):
    one = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=5, temperature=0)
    assert "Paris" in one.choices[0].text
    many = client.completions.create(
        model=MODEL, prompt=["The capital of France is", "Once upon a"], max_tokens=5, temperature=0
    )
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.choices[0].text == one.choices[0].text
    ids = client.completions.create(model=MODEL, prompt=[504, 3575, 282, 4649, 314], max_tokens=5, temperature=0)
    assert ids.choices[0].text == one.choices[0].text
    stream = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=5, temperature=0, stream=True
    )
    assert "".join(choice.text for event in stream for choice in event.choices) == one.choices[0].text


def test_a_conversation(client):
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": [{"type": "text", "text": "And 3 + 3?"}]},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=16)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 3}, "temperature"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(client, arguments, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "x", **arguments)
    assert caught.value.param == param


def test_fields_that_only_annotate_are_ignored(client):
    chat(client, "x", max_tokens=1, user="me", metadata={"a": "b"}, store=False)


def test_an_image_is_refused(client):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [image]}])


def test_a_long_prompt_is_refused_with_both_numbers(client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "word " * 4000)
    assert "2048" in str(caught.value).replace(",", "")


def test_an_unknown_model_is_404_and_the_nearest_is_named(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="smollm2:135", messages=[{"role": "user", "content": "x"}])
    assert MODEL in str(caught.value)


def test_a_broken_model_says_why_and_hides_nobody(client, server):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="broken", messages=[{"role": "user", "content": "x"}])
    assert caught.value.status_code in (400, 404, 500)
    listed = {m["name"]: m for m in server.json("ls")["models"]}
    assert listed["broken"]["refusal"]
    assert listed["tiny"]["refusal"] is None


def test_many_at_once_say_what_one_says(client):
    prompts = [f"What is {a} + {b}?" for a in range(4) for b in range(4)]
    alone = {p: chat(client, p).choices[0].message.content for p in prompts}
    together: dict[str, str] = {}

    def one(prompt):
        together[prompt] = chat(client, prompt).choices[0].message.content

    threads = [threading.Thread(target=one, args=(p,)) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_every_event_has_an_id_and_the_end_is_done(server):
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        server.url + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", "x-stoker-timeline": "1"},
    )
    with urllib.request.urlopen(request) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.read().decode().splitlines()
    ids = [line[3:].strip() for line in lines if line.startswith("id:")]
    assert ids and all(":" in i for i in ids)
    assert [line for line in lines if line.startswith("data:")][-1] == "data: [DONE]"


def test_a_client_that_hangs_up_stops_its_generation(server):
    import http.client
    import time

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Write a very long story."}],
        "max_tokens": 1500,
        "ignore_eos": False,
        "stream": True,
    }
    del body["ignore_eos"]
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    response.read(200)
    connection.close()
    response.close()
    deadline = time.monotonic() + 5
    while any(i["in_flight"] for i in server.json("ps")["instances"]):
        assert time.monotonic() < deadline, "the seat was not given back within 5 s of hanging up"


def test_limits_and_hosts(server):
    assert server.post("/v1/chat/completions", b"{" + b" " * (17 << 20))[0] == 413
    status, error, _ = server.post("/v1/chat/completions", b"{")
    assert status == 400 and error["error"]["message"]
    assert server.get("/v1/models", {"Host": "evil.example"})[0] == 403
    assert server.get("/v1/models/..%2f..%2fetc%2fpasswd")[0] in (400, 404)


def test_metrics_and_health(server):
    assert server.get("/healthz")[0] == 200
    assert server.get("/readyz")[0] == 200
    text = server.get("/metrics")[1]
    for name in ("stoker_gateway", "stoker_controller", "stoker_store", "stoker_node"):
        assert name in text, name
