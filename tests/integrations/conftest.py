"""These are collected for `-m integrations` only: the packages that they import need not be there."""


def pytest_ignore_collect(config):
    return None if "integrations" in config.option.markexpr else True
