"""The OpenAI wire: request and reply types (`chat`), the error envelope (`errors`), prompts from messages (`prompt`)."""
