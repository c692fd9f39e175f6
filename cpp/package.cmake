# What `cmake --install` and a wheel bring: libraries, headers, the CMake package and the pkg-config file. In a wheel all of
# it lies in the Python package's folder. Nothing installed names the place it was built or installed in.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(within "")
set(names NAMELINK_COMPONENT development)
set(pkgconfig_link -lnvpflow)
if(NVPFLOW_PYTHON)
  set(within nvpflow/)
  set(CMAKE_INSTALL_LIBDIR lib)
  set(CMAKE_INSTALL_INCLUDEDIR include)
  set(names NAMELINK_SKIP)  # wheels know no symbolic links
  if(NVPFLOW_SHARED AND CMAKE_EXECUTABLE_FORMAT STREQUAL "ELF")
    set(pkgconfig_link -l:libnvpflow.so.${NVPFLOW_SOVERSION})
  endif()
endif()
set(library_folder ${within}${CMAKE_INSTALL_LIBDIR})
set(include_folder ${within}${CMAKE_INSTALL_INCLUDEDIR})
set(package_folder ${library_folder}/cmake/nvpflow)

if(NOT NVPFLOW_PYTHON)  # a wheel has them beside its metadata
  install(FILES ${PROJECT_SOURCE_DIR}/LICENSE ${PROJECT_SOURCE_DIR}/cpp/licenses/README.md
                ${PROJECT_SOURCE_DIR}/cpp/licenses/nlohmann-json.txt DESTINATION ${CMAKE_INSTALL_DOCDIR})
endif()
install(DIRECTORY ${PROJECT_SOURCE_DIR}/cpp/include/ DESTINATION ${include_folder} FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
# Two export files, because the shared library needs nothing of what the static one's users must find.
# A wheel with CUDA has no static library: whoever links it needs CUDA's toolkit, and the kernels weigh more than all else.
if(NOT (NVPFLOW_PYTHON AND NVPFLOW_WITH_CUDA))
  install(TARGETS nvpflow EXPORT nvpflow-static ARCHIVE DESTINATION ${library_folder} INCLUDES DESTINATION ${include_folder})
  install(EXPORT nvpflow-static NAMESPACE nvpflow:: DESTINATION ${package_folder})
endif()
if(NVPFLOW_SHARED)
  install(TARGETS nvpflow_shared EXPORT nvpflow-shared LIBRARY DESTINATION ${library_folder} ${names}
          INCLUDES DESTINATION ${include_folder})
  install(EXPORT nvpflow-shared NAMESPACE nvpflow:: DESTINATION ${package_folder})
endif()

set(NVPFLOW_STATIC_NEEDS Threads)
if(NVPFLOW_OPENMP)
  list(APPEND NVPFLOW_STATIC_NEEDS OpenMP)
endif()
if(NVPFLOW_WITH_CUDA)
  list(APPEND NVPFLOW_STATIC_NEEDS CUDAToolkit)
endif()
string(REPLACE ";" " " NVPFLOW_STATIC_NEEDS "${NVPFLOW_STATIC_NEEDS}")
configure_package_config_file(cpp/nvpflow-config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/nvpflow-config.cmake
                              INSTALL_DESTINATION ${package_folder} NO_SET_AND_CHECK_MACRO)
# Before 1.0.0 a minor version may break what was.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/nvpflow-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/nvpflow-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/nvpflow-config-version.cmake
        DESTINATION ${package_folder})

# What a program that links the static library needs beside it.
set(pkgconfig_private "-pthread")
if(CMAKE_CXX_IMPLICIT_LINK_LIBRARIES MATCHES "(stdc\\+\\+|c\\+\\+)")
  string(APPEND pkgconfig_private " -l${CMAKE_MATCH_1} -lm")
endif()
if(NVPFLOW_OPENMP)
  string(APPEND pkgconfig_private " ${OpenMP_CXX_FLAGS}")
endif()
if(NVPFLOW_WITH_CUDA)
  string(APPEND pkgconfig_private " -lcudart_static -ldl -lrt")
endif()
string(REGEX REPLACE "[^/]+" ".." up "${CMAKE_INSTALL_LIBDIR}")  # from libdir to the prefix
configure_file(cpp/nvpflow.pc.in ${CMAKE_CURRENT_BINARY_DIR}/nvpflow.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/nvpflow.pc DESTINATION ${library_folder}/pkgconfig)
