# Writes OUTPUT: the GoogleTest macros that tests use, as printed by the preprocessor.
file(WRITE ${OUTPUT}.cpp "#include <gtest/gtest.h>\n")
execute_process(
  COMMAND ${COMPILER} -std=c++20 -stdlib=libc++ -fno-rtti -fno-exceptions -isystem /usr/src/googletest/googletest/include
    -DGTEST_HAS_PTHREAD=1 -dM -E ${OUTPUT}.cpp
  OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE ";" "\\;" text "${text}") # the list separator
string(REGEX MATCHALL "#define (GTEST_|EXPECT_|ASSERT_|TEST|INSTANTIATE_|TYPED_|REGISTER_|SCOPED_TRACE|FAIL|SUCCEED|ADD_FAILURE|RUN_ALL)[^\n]*\n" lines "${text}")
string(REPLACE "\n;" "\n" header "${lines}")
string(REPLACE "\\;" ";" header "${header}")
if(NOT header MATCHES "#define EXPECT_EQ")
  message(FATAL_ERROR "gtest_macros.cmake: no macro EXPECT_EQ in gtest.h: another version of GoogleTest?")
endif()
file(WRITE ${OUTPUT} "// From gtest.h, by test/gtest_macros.cmake.\n#pragma once\n${header}")
