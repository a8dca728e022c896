"""Class removal from a whole network: LiSSA as published, with each of its samplers, against fastif's own removal."""
