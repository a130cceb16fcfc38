"""Scripts, question suites and run files that use the framework to answer one question each."""
