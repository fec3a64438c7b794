"""What a client is told instead of an answer. It does not know who decided so."""


class Refusal(Exception):  # noqa: N818  (of a request, and not our error)
    """One request that gets no answer, and why; every one becomes ``{"error": sentence}``.

    ``status`` is the HTTP status, ``word`` what the metric counts it as, and ``retry_after`` the
    seconds after which the same request may do better.
    """

    def __init__(
        self, status: int, word: str, sentence: str, *, retry_after: int | None = None
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.word = word
        self.sentence = sentence
        self.retry_after = retry_after


def bad_request(sentence: str) -> Refusal:
    """The client's mistake; the same request will never do."""
    return Refusal(400, "bad request", sentence)
