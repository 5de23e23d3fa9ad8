"""What is wrong with data, apart from what reads it: the libraries behind that take seconds to import."""


class DataError(ValueError):
    """A row or source that does not fit the schema: says where, which field, and what was expected."""
