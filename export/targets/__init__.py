"""What an engine needs beside its graphs, for each target that runs it."""
