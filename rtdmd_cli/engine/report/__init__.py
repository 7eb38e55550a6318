"""What a person looks at during and after a run: picture grids (`grid`), line charts (`charts`), report page
(`html`)."""
