# Run as: cmake -DNM=... "-DOBJECTS=a.o;b.o" -P check_symbols.cmake
# An object built for a wider instruction set must offer nothing that code built for a narrower one could be linked with: its
# only global symbol is its table, and it has no weak or unique ones.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only --extern-only ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${NM} could not read ${object}")
  endif()
  string(REGEX REPLACE "\n$" "" symbols "${symbols}")
  string(REPLACE "\n" ";" symbols "${symbols}")
  list(LENGTH symbols count)
  if(NOT count EQUAL 1 OR NOT symbols MATCHES " [RDB] _ZN7nvpflow3cpu[0-9]+isa_")
    message(FATAL_ERROR "${object} offers more than its table: ${symbols}")
  endif()
  message(STATUS "${object}: ${symbols}")
endforeach()
