# Instructions of one log_prob call on one row, counted by callgrind: a regression that the noise of clocks cannot hide.
# valgrind has no AVX-512, so the AVX2 kernels are counted. The difference of two runs leaves out start and end.
#   cmake -DVALGRIND=... -DPROGRAM=one_row -DLIMIT=... -P check_instructions.cmake
function(count_instructions calls result)
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env NVPFLOW_ISA=avx2 ${VALGRIND} --tool=callgrind --callgrind-out-file=/dev/null
            ${PROGRAM} ${calls}
    OUTPUT_QUIET ERROR_VARIABLE log RESULT_VARIABLE status)
  if(NOT status EQUAL 0 OR NOT log MATCHES "Collected : ([0-9]+)")
    message(FATAL_ERROR "callgrind failed:\n${log}")
  endif()
  set(${result} ${CMAKE_MATCH_1} PARENT_SCOPE)
endfunction()

count_instructions(10 few)
count_instructions(1010 many)
math(EXPR each "(${many} - ${few}) / 1000")
message(STATUS "${each} instructions a call, at most ${LIMIT}")
if(each GREATER LIMIT OR each LESS 1000)
  message(FATAL_ERROR "one call of log_prob on one row takes ${each} instructions, expected 1000 to ${LIMIT}: "
                      "configuration A on AVX2 has 1,536 vectors of weights to multiply")
endif()
