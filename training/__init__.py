"""Training an IP-Adapter: pairs, features, their order, the step, the folder of the run."""

import ipadapter  # noqa: F401, isort: skip, first: it sees to it that what follows are our rooms
