def pytest_addoption(parser):
    parser.addoption("--soak-seed", type=int, help="repeat the trials of this seed")
    parser.addoption("--soak-trials", type=int, default=200)
    parser.addoption("--soak-only", type=int, help="the number of a trial: run it alone")
