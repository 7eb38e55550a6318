"""What a person looks at after a run: picture grids (`grid`), line charts (`charts`), report page
(`html`)."""
