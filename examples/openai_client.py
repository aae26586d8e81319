"""Serves a model and asks it with OpenAI's client, also asynchronously; a reply comes when its activations are on disk."""

import asyncio

import roentgen

ASK = {"model": "smollm2-135m", "temperature": 0, "max_tokens": 16}
KEPT = {"session_id": "client", "layers": [12], "hook_points": ["resid_post"]}

# A loaded model is served as it is, from this process; a name, as in roentgen.serve("smollm2-135m"), is loaded to be served.
with roentgen.load("smollm2-135m") as model, roentgen.serve(model, store="results/examples/store") as server:
    print(server.base_url)
    reply = server.client.chat.completions.create(
        messages=[{"role": "user", "content": "What is 12 * 7?"}], extra_body={"activations": KEPT}, **ASK
    )
    print(repr(reply.choices[0].message.content), reply.activations["tensors"]["layers.12.resid_post"])

    async def together(questions: list[str]) -> list[str]:
        """Ask several questions at a time."""
        asked = [
            server.async_client.chat.completions.create(messages=[{"role": "user", "content": text}], **ASK)
            for text in questions
        ]
        return [reply.choices[0].message.content for reply in await asyncio.gather(*asked)]

    print(asyncio.run(together(["Name a color.", "Name a city.", "Name a tree."])))

rows = roentgen.Session.open(reply.activations["uri"]).activations("layers.12.resid_post")
print("read back:", [tuple(item.values.shape) for item in rows])
