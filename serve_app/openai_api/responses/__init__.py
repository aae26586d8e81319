"""OpenAI's Responses API, implemented as another wire format of the chat.

A `ResponsesRequest` (`request`) is checked and rewritten as a chat request, its items (`items`) as messages, and runs as that.
What the chat's reply says, whole or in chunks, becomes a response and its events (`from_chat`, `scored_text`), declared in
`schemas`. Nothing is kept between requests, so whatever names an earlier response or item is refused.
"""
