# Cap'n Proto's definition of the echo.
@0xd1b3a4c95f6e7081;

interface Echo {
  call @0 (text :Text) -> (text :Text);
}
