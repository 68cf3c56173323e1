"""What the service tells of itself while it works: to nobody, unless somebody listens.

The engine must run where there is neither Ray nor Prometheus, so it knows this class alone; in a
replica ``metrics.ReplicaMetrics`` stands in its place.
"""


class Observer:
    """Does nothing. Methods are called on whichever thread it happens, the drawing one among them:
    they must be quick and must not raise. Seconds are of wall-clock time."""

    def waited(self, seconds: float) -> None:
        """A picture was taken out of the queue."""

    def encoded_text(self, seconds: float) -> None:
        """Prompts that were not in memory went through the text encoder, in one batch."""

    def stepped(self, width: int, height: int, num_rows: int, seconds: float) -> None:
        """A batch took a step; size in pixels, rows as they count for the capacity."""

    def decoded(self, kind: str, seconds: float) -> None:
        """A batch went through the autoencoder; ``kind`` is picture or preview."""

    def previewed(self, seconds: float) -> None:
        """The first preview of a picture was shown, so long after it was asked for."""

    def drawn(self, version: int, seconds: float) -> None:
        """A picture was finished, so long after it was asked for."""

    def cancelled(self) -> None:
        """A picture is no longer wanted."""

    def failed(self) -> None:
        """A picture was accepted and could not be drawn."""

    def activated(self, version: int, *, swapped: bool) -> None:
        """A version went live, ``swapped`` if another was live before."""

    def encoded_picture(self, file_format: str, seconds: float) -> None:
        """A picture or preview was made a file."""

    def answered(self, route: str, status: int, reason: str, seconds: float) -> None:
        """A request was answered to its end; ``reason`` is why it was not as wished, or empty."""

    def charged(self, key: str, num_pictures: int, num_units: int) -> None:
        """The key's pictures were accepted."""

    def refused_key(self, key: str) -> None:
        """The key has drawn too much for what it asked now."""


NOBODY = Observer()
