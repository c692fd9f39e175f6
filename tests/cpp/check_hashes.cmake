# Run as: cmake -DNM=... "-DOBJECTS=a.o;b.o" -P check_hashes.cmake
# Whoever writes a file chooses the names in it. The standard library's hashes of text have no secret, so that names can be
# chosen that all collide, and a table of them takes time that is quadratic in the file's size: the library hashes no text.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --undefined-only ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${NM} could not read ${object}")
  endif()
  if(symbols MATCHES "Hash_bytes|hash_memory|murmur|cityhash")
    message(FATAL_ERROR "${object} hashes text: take std::map, std::set or a sorted vector")
  endif()
endforeach()
